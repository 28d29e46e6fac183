from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mpi_mlx.training.optimizer import ADAM_SHARE, Optimizer, clip_by_global_norm, learning_rate_at


def rates(total, **changes):
    spec = SimpleNamespace(
        **{"learning_rate": 1.0, "warmup": 0.0, "schedule": "cosine", "min_lr_ratio": 0.1} | changes
    )
    return [learning_rate_at(step, total, spec) for step in range(total)]


def test_schedules_by_hand():
    linear = rates(10, warmup=0.2, schedule="linear")
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[5] == pytest.approx(0.1 + 0.9 * 4 / 7) and linear[9] == pytest.approx(0.1)
    cosine = rates(12, warmup=0.1, learning_rate=2.0)
    assert cosine[0] == cosine[1] == 2.0  # a warm-up of one step
    assert cosine[6] == pytest.approx(2 * 0.55) and cosine[11] == pytest.approx(0.2)
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert rates(4, schedule="constant", warmup=0.5) == [0.5, 1.0, 1.0, 1.0]
    assert rates(1) == [1.0]


class Net(nn.Module):
    def __init__(self, **parameters):
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, mx.array(value))


def test_one_step_of_adamw_by_hand():
    net = Net(w=[1.0, -2.0, 3.0])
    optimizer = Optimizer("adamw", weight_decay=0.1)
    optimizer.init(net.trainable_parameters())
    optimizer.update(net, {"w": mx.array([0.5, 0.25, -4.0])}, 0.1)
    # bias-corrected, the first step is the gradient's sign; the decay is 0.1 x 0.1 of the weight
    np.testing.assert_allclose(np.array(net.w), [0.99 - 0.1, -1.98 - 0.1, 2.97 + 0.1], rtol=1e-5)
    # second: m = 0.9 m + 0.1 g, v = 0.99 v + 0.01 g^2, both bias-corrected
    m = (0.9 * 0.1 * 0.5 + 0.1 * 1.0) / (1 - 0.9**2)
    v = (0.99 * 0.01 * 0.25 + 0.01 * 1.0) / (1 - 0.99**2)
    optimizer.update(net, {"w": mx.array([1.0, 0.0, 0.0])}, 0.1)
    assert net.w[0].item() == pytest.approx(0.89 * 0.99 - 0.1 * m / v**0.5, rel=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_small_steps_add_up_in_16_bits(kind, tmp_path):
    """100 steps of 1e-4 against the gradient's sign: 1 becomes 0.99, though 1 - 1e-4 is 1 in bfloat16."""
    net = Net(w=mx.ones(3, mx.bfloat16))
    optimizer = Optimizer(kind, adam_share=1.0)
    optimizer.init(net.trainable_parameters())
    for step in range(100):
        if step == 50:  # the copies go round with the rest of the state
            mx.save_safetensors(str(tmp_path / "state.safetensors"), optimizer.state)
            optimizer = Optimizer(kind, adam_share=1.0)
            optimizer.load_state(mx.load(str(tmp_path / "state.safetensors")))
        optimizer.update(net, {"w": mx.array([1.0, -1.0, 0.5], mx.bfloat16)}, 1e-4)
    assert net.w.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(net.w.astype(mx.float32)), [0.99, 1.01, 0.99], atol=0.004)  # half a last place
    assert optimizer.masters["w"].tolist() == pytest.approx([0.99, 1.01, 0.99], abs=1e-4)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "embed_tokens": (5, 3), "lm_head": (5, 3), "bias": (3,), "conv": (2, 2, 2)}
    net = Net(**{k: np.zeros(s, np.float32) for k, s in shapes.items()})
    gradients = {k: mx.array(rng.uniform(0.1, 5.0, s).astype(np.float32)) for k, s in shapes.items()}
    optimizer = Optimizer("muon")
    optimizer.init(net.trainable_parameters())
    optimizer.update(net, gradients, 0.01)
    for name in ("embed_tokens", "lm_head", "bias", "conv"):
        np.testing.assert_allclose(np.array(net[name]), -0.01 * ADAM_SHARE, rtol=1e-4)
    # Muon: the gradient with its singular values drawn to about one, times sqrt(rows / columns)
    values = np.linalg.svd(np.array(net.w) / (0.01 * (4 / 3) ** 0.5), compute_uv=False)
    assert (0.5 < values).all() and (values < 1.5).all()
    given = np.linalg.svd(np.array(gradients["w"]), compute_uv=False)
    assert given.max() / given.min() > 4
    with pytest.raises(ValueError, match="unknown optimizer"):
        Optimizer("sgd")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_goes_round(kind, tmp_path):
    rng = np.random.default_rng(1)
    gradients = [
        {"w": mx.array(rng.normal(size=(4, 3)).astype(np.float32)), "b": mx.array([float(i)])}
        for i in range(3)
    ]

    def start():
        net = Net(w=np.ones((4, 3), np.float32), b=[1.0])
        optimizer = Optimizer(kind)
        optimizer.init(net.trainable_parameters())
        return net, optimizer

    net, optimizer = start()
    for g in gradients[:2]:
        optimizer.update(net, g, 0.1)
    mx.save_safetensors(str(tmp_path / "o.safetensors"), optimizer.state)
    other, fresh = start()
    other.update(dict(net.parameters()))
    fresh.load_state(mx.load(str(tmp_path / "o.safetensors")))
    forgetful = start()[1]
    third = Net(**{k: np.array(v) for k, v in net.parameters().items()})
    for n, o in ((net, optimizer), (other, fresh), (third, forgetful)):
        o.update(n, gradients[2], 0.1)
    for (name, a), (_, b), (_, c) in zip(
        *(tree_flatten(n.parameters()) for n in (net, other, third)), strict=True
    ):
        assert mx.array_equal(a, b), name
        assert not mx.array_equal(a, c), name


def test_clipping_is_of_the_global_norm():
    gradients = {"a": mx.array([3.0]), "b": {"c": mx.array([[0.0, -4.0]])}}
    clipped, norm = clip_by_global_norm(gradients, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert clipped["a"].item() == pytest.approx(0.6) and clipped["b"]["c"][0, 1].item() == pytest.approx(-0.8)
    for limit in (0.0, 10.0):  # 0: no limit
        same, norm = clip_by_global_norm(gradients, limit)
        assert same["a"].item() == 3.0 and norm.item() == pytest.approx(5.0)
