import json

import mlx.core as mx
import mlx.nn as nn
import pytest

from mpi_mlx.errors import CheckpointError
from mpi_mlx.training import checkpoint as ckpt
from mpi_mlx.training.optimizer import Optimizer


class Net(nn.Module):
    def __init__(self, size=2):
        super().__init__()
        self.w = mx.ones((size, 2))
        self.frozen = mx.zeros(3)
        self.freeze(keys=["frozen"])


def made(size=2, updates=0):
    net = Net(size)
    optimizer = Optimizer("adamw")
    optimizer.init(net.trainable_parameters())
    for _ in range(updates):
        optimizer.update(net, {"w": mx.full((size, 2), 0.5)}, 0.1)
    return net, optimizer


def test_round_trip(tmp_path):
    net, optimizer = made(updates=2)
    folder = ckpt.checkpoint_folder(tmp_path / "checkpoints", 7)
    ckpt.save_checkpoint(folder, net, optimizer, {"step": 7, "source": {"cursor": 12}, "best": None})
    assert sorted(p.name for p in folder.iterdir()) == [
        "optimizer.safetensors",
        "parameters.safetensors",
        "state.json",
    ]
    assert list(mx.load(str(folder / "parameters.safetensors"))) == ["w"]  # what is frozen is not kept
    other, fresh = made()
    assert ckpt.load_checkpoint(folder, other, fresh) == {"step": 7, "source": {"cursor": 12}, "best": None}
    for n, o in ((net, optimizer), (other, fresh)):
        o.update(n, {"w": mx.full((2, 2), -1.0)}, 0.1)
    assert mx.array_equal(net.w, other.w) and not mx.array_equal(net.w, mx.ones((2, 2)))


def test_the_newest_two_and_the_best_stay(tmp_path):
    for step in (2, 4, 10, 100):
        ckpt.save_checkpoint(ckpt.checkpoint_folder(tmp_path, step), *made(), {"step": step})
    ckpt.prune(tmp_path, best=2)
    assert [step for step, _ in ckpt.checkpoints(tmp_path)] == [2, 10, 100]
    ckpt.prune(tmp_path)
    assert [step for step, _ in ckpt.checkpoints(tmp_path)] == [10, 100]


def test_killed_while_writing_is_as_if_it_had_not_begun(tmp_path, monkeypatch):
    ckpt.save_checkpoint(ckpt.checkpoint_folder(tmp_path, 2), *made(), {"step": 2})

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ckpt, "replace_dir", die)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save_checkpoint(ckpt.checkpoint_folder(tmp_path, 4), *made(), {"step": 4})
    (tmp_path / ".step-000006-abc").mkdir()  # what SIGKILL leaves
    (tmp_path / ".step-000006-abc" / "state.json").write_text("{}")
    (tmp_path / "step-000008").mkdir()
    assert [step for step, _ in ckpt.checkpoints(tmp_path)] == [2]


@pytest.mark.parametrize(
    "name, words",
    [
        ("parameters.safetensors", "cannot be read"),
        ("optimizer.safetensors", "cannot be read"),
        ("state.json", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, words):
    folder = tmp_path / "step-000002"
    ckpt.save_checkpoint(folder, *made(), {"step": 2})
    (folder / name).write_bytes((folder / name).read_bytes()[:5])
    with pytest.raises(CheckpointError, match=f"{name} {words}.*delete") as error:
        ckpt.load_checkpoint(folder, *made())
    assert "\n" not in str(error.value)


def test_another_models_parameters_are_refused(tmp_path):
    folder = tmp_path / "step-000002"
    ckpt.save_checkpoint(folder, *made(), {"step": 2})
    net, optimizer = made(size=3)
    with pytest.raises(CheckpointError, match="1 tensors do not fit this recipe's model, first 'w'"):
        ckpt.load_checkpoint(folder, net, optimizer)
    assert mx.array_equal(net.w, mx.ones((3, 2)))
    mx.save_safetensors(str(folder / "parameters.safetensors"), {"w": mx.zeros((3, 2)), "extra": mx.zeros(1)})
    with pytest.raises(CheckpointError, match="first 'extra'"):
        ckpt.load_checkpoint(folder, net, optimizer)
    assert json.loads((folder / "state.json").read_text()) == {"step": 2}
