"""`mpi-mlx train --dry-run`: what a recipe comes to, before anything is trained or written."""

from __future__ import annotations

from dataclasses import dataclass


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
        rows, tokens = largest(stage, prepared)
        memory = None
        if rows is not None:
            memory = memory_estimate(
                model, rows=rows, tokens=tokens, optimizer=stage.optimizer,
                gradient_checkpointing=stage.gradient_checkpointing,
            ).total
        stages.append(StagePlan(stage.stage, prepared.steps, rows, tokens, memory))
    return *count_parameters(model), stages


def largest(stage, prepared) -> tuple[int | None, int | None]:
    """(rows, tokens) of a stage's largest micro-batch."""
    if stage.stage == "pretrain":
        return None, None
    if stage.stage != "rl":
        return min(stage.batch_size, prepared.labelled.rows), prepared.labelled.longest
    group = stage.group_size + stage.policy_aware
    at_once = max(group, min(stage.prompts * group, stage.micro_tokens // stage.max_completion_tokens))
    return at_once, prepared.prompts.longest + stage.max_completion_tokens
