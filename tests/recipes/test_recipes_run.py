"""The shipped recipes for real models, run whole: every stage and evaluation, a few steps, on tiny random
checkpoints of the same architecture with the real processor and chat template."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mpi_mlx.recipe import load_recipe
from mpi_mlx.training.reports import EvaluationRow, RunFinished, StageFinished, StepReport
from mpi_mlx.training.run import train

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES.parent / "tests" / "models"))  # checkpoint makers

from checkpoints import write_qwen2_5_vl  # noqa: E402
from family_checkpoints import write_text  # noqa: E402

# SmolLM2-Instruct's own template
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FEW_STEPS = [
    "stages.0.steps=2", "stages.0.batch_size=2", "stages.1.steps=2", "stages.1.batch_size=2",
    "stages.2.steps=2", "stages.2.prompts=2", "stages.2.max_completion_tokens=8",
    "stages.2.overlong_buffer=0",
    # Random weights earn nothing of what the recipes reward: some last letters stand in for the format.
    'stages.2.rewards.1={kind: regex, pattern: "[a-m][^a-z]*$", of: completion}',
    "evaluation.samples=2", "evaluation.max_completion_tokens=8",
]  # fmt: skip
FEW_EXAMPLES = [f"data.{split}=2" for split in ("train", "rl", "validation", "test")]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return write_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    return write_text(folder, "llama", SMOLLM2_TEMPLATE, hidden_size=48, num_attention_heads=3,
                      num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip


def run_whole(path: Path, base: str | Path, output: Path, *overrides: str) -> list:
    """Runs a recipe with few steps and checks what every run must leave behind; returns the reports."""
    recipe = load_recipe(path, [f"model.base={base}", *FEW_STEPS, *overrides], output=output)
    reports = list(train(recipe))
    assert isinstance(reports[-1], RunFinished)
    assert [r.stage for r in reports if isinstance(r, StageFinished)] == ["cpt", "sft", "rl"]
    steps = [r for r in reports if isinstance(r, StepReport)]
    assert [r.stage for r in steps] == ["cpt"] * 2 + ["sft"] * 2 + ["rl"] * 2
    assert all(r.loss > 0 and r.grad_norm > 0 for r in steps[:4])  # cross-entropy of random weights
    if str(base) != "embedded:tiny":  # trained, it begins every answer alike: no rewards differ in 8 tokens
        assert any(r.grad_norm > 0 for r in steps[4:])  # a group whose rewards differ
    rows = [(r.row["model"], r.row["document_in_context"]) for r in reports if isinstance(r, EvaluationRow)]
    assert rows == [(name, seen) for name in ("base", "cpt", "sft", "rl") for seen in (False, True)]
    written = json.loads((output / "evaluation" / "results.json").read_text())["rows"]
    assert [(r["model"], r["document_in_context"]) for r in written] == rows
    # the document stands in the prompt in one mode and not in the other
    assert all(with_["prompt_tokens"] > without["prompt_tokens"] + 50
               for without, with_ in zip(written[::2], written[1::2], strict=True))  # fmt: skip
    adapter = mx.load(str(output / "adapter" / "adapters.safetensors"))
    assert any(mx.any(v != 0).item() for k, v in adapter.items() if k.endswith("lora_b"))  # it starts at zero
    assert (output / "report.md").stat().st_size > 0
    return reports


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen2.5-vl-7b"])
def test_clevr_policy(name, qwen, tmp_path):
    path = RECIPES / "clevr_policy" / f"{name}.yaml"
    shipped = load_recipe(path)
    assert shipped.model.quantize == 4 and shipped.data.style == "clevr"
    assert shipped.model.max_pixels == shipped.data.image_size**2  # pictures are drawn as they are seen
    small = ["data.image_size=56", "data.depth=2", "evaluation.forgetting=false"]
    run_whole(path, qwen, tmp_path / "run", *FEW_EXAMPLES, *small)


def test_text_policy(smollm2, tmp_path):
    # The tiny tokenizer makes 3,000 tokens of the rulebook: its first section will do here.
    (tmp_path / "rulebook.md").write_text(
        (RECIPES / "text_policy" / "rulebook.md").read_text().partition("## The seven facts")[0]
    )
    short = [f"data.document={tmp_path / 'rulebook.md'}", "stages.2.minibatches=2", "evaluation.after=null"]
    for split in ("train", "rl", "validation", "test"):
        lines = (RECIPES / "text_policy" / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:3]))
        short.append(f"data.{split}={tmp_path / split}.jsonl")
    reports = run_whole(RECIPES / "text_policy" / "smollm2.yaml", smollm2, tmp_path / "run", *short)
    rl = [r for r in reports if isinstance(r, StepReport) and r.stage == "rl"]
    assert all({"reward/exact_match", "reward/true_trace"} <= set(r.metrics) for r in rl)


@pytest.mark.parametrize("base", ["qwen", "embedded:tiny"])
def test_your_policy(base, qwen, tmp_path):
    base = qwen if base == "qwen" else base
    reports = run_whole(RECIPES / "your_policy" / "recipe.yaml", base, tmp_path / "run")
    rl = [r for r in reports if isinstance(r, StepReport) and r.stage == "rl"]
    assert all("reward/looked_at_everything" in r.metrics for r in rl)
