"""Training on both sides: what a run here has learnt runs in peft and transformers, and what peft has learnt
goes on learning here."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import yaml
from PIL import Image

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from checkpoints import write_qwen2_5_vl  # noqa: E402
from family_checkpoints import write_qwen3_vl, write_smolvlm, write_text  # noqa: E402

from mpi_mlx.convert import torch_side  # noqa: E402
from mpi_mlx.convert.fuse import fuse  # noqa: E402
from mpi_mlx.convert.peft import from_peft, to_peft  # noqa: E402
from mpi_mlx.convert.weights import to_hf  # noqa: E402
from mpi_mlx.data.examples import load_examples  # noqa: E402
from mpi_mlx.models import load_model, probe  # noqa: E402
from mpi_mlx.models.adapters import adapter_tensors  # noqa: E402
from mpi_mlx.recipe import load_recipe  # noqa: E402
from mpi_mlx.stages.supervised import SupervisedObjective, SupervisedSource, encode_example  # noqa: E402
from mpi_mlx.training.fit import fit  # noqa: E402
from mpi_mlx.training.optimizer import Optimizer  # noqa: E402
from mpi_mlx.training.reports import StepReport  # noqa: E402
from mpi_mlx.training.run import train  # noqa: E402

MAKE = {
    "llama": lambda f: write_text(f, "llama"),
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "smolvlm": write_smolvlm,
}
DOORS = [("red", "open"), ("blue", "shut"), ("green", "open")]
# every row in every step, so that losses are of the same tokens; a rate that does not change
STAGE = {"stage": "sft", "steps": 10, "batch_size": len(DOORS), "schedule": "constant", "warmup": 0.0}


def write_project(folder, base, family, kind, rate):
    """A rulebook, three examples (with a picture each, where the model sees), and a recipe of ten steps."""
    (folder / "policy.md").write_text("# Doors\n\nRed and green doors open; blue doors stay shut.\n")
    lines = []
    for colour, answer in DOORS:
        content = [{"type": "text", "text": f"a {colour} door"}]
        if family != "llama":
            Image.new("RGB", (96, 64), colour).save(folder / f"{colour}.png")
            content.insert(0, {"type": "image", "image": f"{colour}.png"})
        messages = [{"role": "user", "content": content}]
        lines.append({"id": colour, "messages": messages, "reasoning": f"It is {colour}.", "answer": answer})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": {"base": str(base), "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8, "kind": kind},
        "data": {"document": "policy.md", "train": "train.jsonl"},
        "stages": [{**STAGE, "learning_rate": rate}],
        "evaluation": {"after": [], "forgetting": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def worst(ours, theirs):
    return max(probe.relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", MAKE)
def test_ten_steps_here_then_peft_and_transformers(tmp_path, family, kind):
    torch.set_num_threads(1)
    base, run = tmp_path / "base", tmp_path / "run"
    MAKE[family](base)
    recipe = write_project(tmp_path, base, family, kind, 1e-3 if kind == "rslora" else 3e-3)
    losses = [r.loss for r in train(load_recipe(recipe, output=run)) if isinstance(r, StepReport)]
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.05
    to_hf(base, tmp_path / "hf", check=False)
    config = probe.read_config(tmp_path / "hf")
    probes = probe.probe_inputs(config)
    # base, then base + adapter: the adapter must show
    plain = probe.mlx_logits(probe.load_net(base), config, probes)
    ours = probe.mlx_logits(probe.load_net(base, adapter=run / "adapter"), config, probes)
    assert worst(plain, ours) > 1e-3

    to_peft(run, tmp_path / "peft", base=tmp_path / "hf", check=False)
    model, info = torch_side.load_torch(tmp_path / "hf")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    assert worst(ours, torch_side.torch_logits(adapted, config, probes)) < 1e-5

    fuse(run, tmp_path / "fused", check=False)
    merged = torch_side.torch_logits(torch_side.load_torch(tmp_path / "fused")[0], config, probes)
    assert worst(merged, ours) < 1e-5
    card = (tmp_path / "fused" / "README.md").read_text()
    recorded = json.loads((run / "environment.json").read_text())["document"]
    assert recorded["name"] == "policy" and len(recorded["sha256"]) == 64
    for piece in (str(base), "| Stages | sft |", "policy (sha256", recorded["sha256"], "rank 4"):
        assert piece in card


def inputs_of(config, encoded):
    """A row as transformers takes it."""
    arrays = {}
    if encoded.images:
        (image,) = encoded.images
        pixels = np.asarray(image.pixel_values)
        arrays["pixel_values"] = pixels if config["model_type"] in probe.MROPE else pixels[None]
        if image.grid:
            arrays["image_grid_thw"] = np.array([image.grid])
    return torch_side.torch_inputs(config, probe.Probe("row", encoded.ids[None].astype(np.int64), arrays))


def torch_loss(model, config, rows):
    """Cross-entropy a trained token over all rows, as ``fit`` reports it."""
    total, count = 0.0, 0.0
    for row in rows:
        keys = inputs_of(config, row.encoded)
        losses = torch.nn.functional.cross_entropy(
            model(**keys).logits[0, :-1], keys["input_ids"][0, 1:], reduction="none"
        )
        weights = torch.from_numpy(row.weights[1:])
        total, count = total + (losses * weights).sum(), count + weights.sum()
    return total / count


def train_in_peft(hf, rows, folder):
    """Ten steps of AdamW on the rows, saved; returns the losses before each step and after the last."""
    config = probe.read_config(hf)
    model, _ = torch_side.load_torch(hf)
    # where a vision tower has linears of these names, they are adapted too
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(10):
        loss = torch_loss(model, config, rows)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        losses.append(torch_loss(model, config, rows).item())
    model.save_pretrained(folder)
    return losses


@pytest.mark.parametrize("family", MAKE)
def test_ten_steps_in_peft_then_training_goes_on_here(tmp_path, family):
    torch.set_num_threads(1)
    base = tmp_path / "base"
    MAKE[family](base)
    spec = load_recipe(write_project(tmp_path, base, family, "lora", 3e-3)).stages[0]
    examples = load_examples(tmp_path / "train.jsonl")
    bare = load_model(base, dtype="float32")
    rows = [encode_example(bare, e, None, "sft") for e in examples]
    to_hf(base, tmp_path / "hf", check=False)
    losses = train_in_peft(tmp_path / "hf", rows, tmp_path / "peft")
    assert losses[-1] < losses[0] - 0.05

    from_peft(tmp_path / "peft", tmp_path / "adapter", base=base, check=False)
    model = load_model(base, adapter=tmp_path / "adapter", dtype="float32")
    before = {n: mx.array(v) for n, v in adapter_tensors(model).items() if "vision" in n}
    model.net.train()
    optimizer = Optimizer(spec.optimizer)
    optimizer.init(model.net.trainable_parameters())
    source, objective = SupervisedSource(model, examples, None, spec, 0), SupervisedObjective(model)
    ours = [r.loss for r in fit(model.net, source, objective, spec, total=10, seed=0, optimizer=optimizer)]
    assert ours[0] == pytest.approx(losses[-1], rel=1e-5)
    assert ours[-1] < ours[0] - 0.05
    # the tower stays frozen here: what peft trained in it is kept as it is
    assert all(mx.array_equal(v, before[n]).item() for n, v in adapter_tensors(model).items() if "vision" in n)
    assert bool(before) == (family in ("qwen2_5_vl", "smolvlm"))

