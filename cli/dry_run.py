"""`mpi-mlx train --dry-run`: what a recipe comes to, before anything is trained or written."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class StagePlan:
    """``rows`` and ``tokens``: the largest micro-batch's; ``memory`` in bytes; None where it is not known."""

    name: str
    steps: int
    rows: int | None = None
    tokens: int | None = None
    memory: int | None = None


def show_plan(recipe) -> None:
    """Prints the resolved recipe, the parameters, and each stage's steps and memory.

    Raises:
        MPIError: whatever `mpi-mlx train` would refuse at its start, but for a taken output folder.
    """
    from mpi_mlx_cli.state import many, size
    from rich.console import Console
    from rich.syntax import Syntax
    from rich.table import Table

    console = Console(highlight=False)
    text = recipe.to_yaml().rstrip()
    if console.is_terminal:
        console.print(Syntax(text, "yaml", background_color="default"))
    else:
        print(text)
    total, trainable, stages = plan(recipe)
    console.print(f"\n{many(total)} parameters, {many(trainable)} trained ({trainable / max(total, 1):.1%})")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for heading in ("steps", "rows at once", "longest row", "memory"):
        table.add_column(heading, justify="right")
    for stage in stages:
        row = "-" if stage.tokens is None else f"{stage.tokens:,} tokens"
        memory = "-" if stage.memory is None else f"about {size(stage.memory)}"
        table.add_row(stage.name, str(stage.steps), str(stage.rows or "-"), row, memory)
    console.print(table)
    console.print(f"nothing was trained or written; output would be {recipe.output}", style="dim")


def plan(recipe) -> tuple[int, int, list[StagePlan]]:
    """(all parameters, trained parameters, a plan a stage); loads the model and the data as training does."""
    from mpi_mlx.models.memory import count_parameters, memory_estimate
    from mpi_mlx.training.prepare import prepare

    ready = prepare(recipe)
    model, stages = ready.model, []
    for stage, prepared in zip(recipe.stages, ready.stages, strict=True):
        batches = micro_batches(stage, prepared)
        options = dict(optimizer=stage.optimizer, gradient_checkpointing=stage.gradient_checkpointing)
        memory = max((memory_estimate(model, **batch, **options).total for batch in batches), default=None)
        rows, tokens = (max((batch[of] for batch in batches), default=None) for of in ("rows", "tokens"))
        stages.append(StagePlan(stage.stage, prepared.steps, rows, tokens, memory))
    return *count_parameters(model), stages


def micro_batches(stage, prepared) -> list[dict[str, int]]:
    """The kinds of micro-batch that a stage has, as ``memory_estimate`` wants them."""
    if stage.stage == "pretrain":
        return []
    if stage.stage == "rl":
        group, prompt = stage.group_size + stage.policy_aware, prepared.prompts.longest
        each = prompt + group * stage.max_completion_tokens
        groups = max(1, min(stage.prompts, stage.micro_tokens // each))
        tokens = prompt + stage.max_completion_tokens
        rollouts = dict(rows=groups * group, tokens=tokens, shared=prompt, groups=groups)
        mixed_in = [] if prepared.labelled is None else _labelled(stage, stage.sft_batch_size, prepared.labelled)
        return [rollouts, *mixed_in]
    return _labelled(stage, stage.batch_size, prepared.labelled)


def _labelled(stage, batch_size: int, found) -> list[dict[str, int]]:
    """Rows with the document, which they share, and rows without it."""
    rows = min(batch_size, found.rows)
    if not found.document:
        return [dict(rows=rows, tokens=found.longest)]
    carrying = rows if stage.stage == "cpt" else ceil(rows * stage.document_fraction)
    carried = dict(rows=carrying, tokens=found.longest, shared=found.document)
    bare = dict(rows=rows, tokens=found.longest - found.document)
    return [carried] if carrying == rows else [carried, bare]
