"""Whole runs small enough for tests: a qwen2_5_vl of hidden size 32, ClevrPolicy of depth 1, a few steps."""

import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))  # checkpoint makers

from checkpoints import write_qwen2_5_vl  # noqa: E402

STAGES = {
    "cpt": dict(stage="cpt", steps=4, batch_size=2, learning_rate=0.01, save_every=2),
    "sft": dict(
        stage="sft", steps=4, batch_size=2, accumulate=2, learning_rate=0.01, save_every=2, optimizer="muon",
        document_fraction=0.5, validate_every=2,
    ),
    "rl": dict(
        stage="rl", steps=4, prompts=2, group_size=2, policy_aware=1, policy_aware_sampler="reference", kl_coef=0.1,
        updates_per_rollout=2, learning_rate=0.01, max_completion_tokens=6, save_every=2,
        # random weights earn nothing else
        rewards=[
            {"kind": "regex", "pattern": "[aeiou]", "of": "completion"}, {"kind": "format", "weight": 0.5},
        ],
    ),
}  # fmt: skip
TIMED = ("seconds", "tokens_per_second", "memory_bytes")
TIMED_IN_ROWS = ("seconds", "prefill_seconds", "decode_tokens_per_second")


def write_base(folder: Path, **changes) -> Path:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return write_qwen2_5_vl(folder, **sizes, intermediate_size=48, **changes)


def write_recipe(file: Path, base: Path, stages=("cpt", "sft", "rl"), **changes) -> Path:
    """``stages``: names of STAGES, or stages of one's own. ``changes`` replace whole blocks."""
    recipe = {
        "model": {"base": str(base)},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {"benchmark": "clevr_policy", "depth": 1, "train": 5, "rl": 6, "validation": 2, "test": 2},
        "stages": [STAGES[s] if isinstance(s, str) else s for s in stages],
        "evaluation": {"batch_size": 2, "max_completion_tokens": 4, "forgetting": False},
        "seed": 3,
    } | changes
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file


def metrics(run: Path, *, timed: bool = False) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows if timed else [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def result_rows(run: Path) -> list[dict]:
    rows = json.loads((run / "evaluation" / "results.json").read_text(encoding="utf-8"))["rows"]
    return [{k: v for k, v in row.items() if k not in TIMED_IN_ROWS} for row in rows]


def adapters(run: Path) -> dict[str, bytes]:
    """Every adapter of a run: its path in the run, and its bytes."""
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("adapters.safetensors"))}
