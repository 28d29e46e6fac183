"""What is trained here runs in peft and transformers: our model loader, our LoRA, ten steps, exported."""

import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from checkpoints import write_qwen2_5_vl  # noqa: E402
from family_checkpoints import write_qwen3_vl, write_smolvlm, write_text  # noqa: E402

from mpi_mlx.convert import torch_side  # noqa: E402
from mpi_mlx.convert.fuse import fuse  # noqa: E402
from mpi_mlx.convert.peft import from_peft, to_peft  # noqa: E402
from mpi_mlx.convert.weights import to_hf  # noqa: E402
from mpi_mlx.models import load_model, probe  # noqa: E402
from mpi_mlx.models.adapters import load_adapter, save_adapter  # noqa: E402
from mpi_mlx.models.lora import attach_lora  # noqa: E402

MAKE = {
    "llama": lambda f: write_text(f, "llama"),
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "smolvlm": write_smolvlm,
}


def train(model, steps=10, rate=1e-2):
    """Ten steps on one row of text; returns the losses."""
    ids = mx.array(np.random.default_rng(0).integers(20, 200, (1, 16)).astype(np.int32))
    positions = mx.broadcast_to(mx.arange(16)[None], (1, 16))
    if model.uses_mrope:
        positions = mx.broadcast_to(positions[None], (3, 1, 16))

    def loss_of(net):
        logits = model.head(model.hidden(model.embed(ids), positions))
        return nn.losses.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="mean")

    step, optimizer, losses = nn.value_and_grad(model.net, loss_of), optim.Adam(rate), []
    for _ in range(steps):
        loss, grads = step(model.net)
        optimizer.update(model.net, grads)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", MAKE)
def test_ten_steps_here_then_peft_and_transformers(tmp_path, family, kind):
    torch.set_num_threads(1)
    folder = tmp_path / "base"
    MAKE[family](folder)
    model = load_model(folder, dtype="float32")
    spec = SimpleNamespace(rank=4, alpha=8, dropout=0.0, targets="all-linear", kind=kind, projector=False)
    attach_lora(model, spec)
    losses = train(model, rate=1e-3 if kind == "rslora" else 3e-3)
    assert losses[-1] < losses[0] - 0.05
    save_adapter(model, tmp_path / "adapter")
    to_hf(folder, tmp_path / "hf", check=False)
    config = probe.read_config(tmp_path / "hf")
    probes = probe.probe_inputs(config)
    # base, then base + adapter: the adapter must show
    plain = probe.mlx_logits(probe.load_net(folder), config, probes)
    ours = probe.mlx_logits(probe.load_net(folder, adapter=tmp_path / "adapter"), config, probes)
    assert max(probe.relative_error(a, b) for a, b in zip(plain, ours, strict=True)) > 1e-3

    to_peft(tmp_path / "adapter", tmp_path / "peft", base=tmp_path / "hf", check=False)
    base, info = torch_side.load_torch(tmp_path / "hf")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = torch_side.torch_logits(
        peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval(), config, probes
    )
    assert max(probe.relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5

    fuse(tmp_path / "adapter", tmp_path / "fused", base=folder, check=False)
    merged = torch_side.torch_logits(torch_side.load_torch(tmp_path / "fused")[0], config, probes)
    assert max(probe.relative_error(a, b) for a, b in zip(merged, ours, strict=True)) < 1e-5

    # and back: training goes on from the loss it left
    from_peft(tmp_path / "peft", tmp_path / "again", base=tmp_path / "hf", check=False)
    left = train(model, steps=1)[0]
    again = load_model(folder, dtype="float32")
    load_adapter(again, tmp_path / "again")
    went_on = train(again, rate=1e-3)
    assert went_on[0] == pytest.approx(left, rel=1e-4)
    assert went_on[-1] < went_on[0]
