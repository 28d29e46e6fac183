"""The recipe that is written beside a generated dataset."""

from __future__ import annotations

from mpi_mlx.data.dataset import Dataset
from mpi_mlx.data.write import written_splits

_HEAD = """\
# Written by: {command}
model: {model}
lora: {{rank: 16, alpha: 32}}
data: {{document: document{files}}}
stages:
"""

# The numbers of recipes/quickstart.yaml.
_TINY = {
    "cpt": "  - {stage: cpt, steps: 20, batch_size: 8, learning_rate: 4.0e-4}\n",
    "sft": "  - {stage: sft, steps: 60, batch_size: 8, learning_rate: 8.0e-4, document_fraction: 0.25}\n",
    "rl": """\
  - stage: rl
    algorithm: grpo
    steps: 80
    prompts: 8
    group_size: 4
    policy_aware: 4
    policy_aware_sampler: reference
    learning_rate: 4.0e-4
    updates_per_rollout: 2
""",
}

# Those of a 3B model on 16 GB; recipes/clevr_policy/ gives the reasons.
_REAL = {
    "cpt": """\
  - {stage: cpt, steps: 40, batch_size: 4, accumulate: 2, learning_rate: 2.0e-4, gradient_checkpointing: true}
""",
    "sft": """\
  - stage: sft
    steps: 60
    batch_size: 4
    accumulate: 2
    learning_rate: 2.0e-4
    document_fraction: 0.25
    gradient_checkpointing: true
""",
    "rl": """\
  - stage: rl
    algorithm: grpo
    steps: 100
    prompts: 4
    group_size: 6
    policy_aware: 6
    learning_rate: 5.0e-5
    gradient_checkpointing: true
""",
}

_TAIL = """\
    max_completion_tokens: {longest}
    rewards: [{{kind: exact_match, weight: 1.0}}, {{kind: format, weight: 0.1}}]
evaluation: {{batch_size: {batch}, max_completion_tokens: {longest}}}
output: runs/{name}
seed: 0
"""


def recipe_text(name: str, dataset: Dataset, model: str, command: str) -> str:
    """YAML that trains ``model`` on the files that ``write_dataset`` writes for ``dataset``.

    ``name`` is the run's; ``command`` says in a comment how the files were made. Without labelled examples
    the recipe has the rl stage alone.
    """
    tiny = model.startswith("embedded:")
    labelled = ("cpt", "sft") if dataset.train else ()
    stages = _TINY if tiny else _REAL
    characters = max(len(e.reasoning or "") + len(e.answer or "") for e in dataset.train or dataset.rl)
    values = {
        "command": command,
        "name": name,
        "model": f"{{base: {model}}}" if tiny else f"{{base: {model}, quantize: 4, max_pixels: 112896}}",
        "files": "".join(f", {split}: {split}.jsonl" for split in written_splits(dataset)),
        "longest": 32 * (characters // 128 + 2),  # a token has about five characters
        "batch": 64 if tiny else 32,
    }
    body = "".join(stages[stage] for stage in (*labelled, "rl"))
    return _HEAD.format(**values) + body + _TAIL.format(**values)
