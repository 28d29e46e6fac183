"""`mpi-mlx train --dry-run`: what a recipe comes to, before anything is trained or written."""

from __future__ import annotations

from dataclasses import dataclass

MEASURED = 64  # examples whose lengths are looked at, the longest texts first


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
        MPIError: whatever `mpi-mlx train` would refuse at its start.
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
    import mlx.core as mx

    from mpi_mlx import runtime
    from mpi_mlx.data.dataset import load_dataset
    from mpi_mlx.models import load_model
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.models.memory import count_parameters, memory_estimate
    from mpi_mlx.stages.build import stage_steps

    runtime.configure()
    dataset = None if recipe.data is None else load_dataset(recipe.data, recipe.folder)
    spec = recipe.model
    model = load_model(
        spec.base, quantize=spec.quantize, max_pixels=spec.max_pixels, dtype=spec.dtype, init=spec.init,
        seed=recipe.seed,
    )
    if recipe.lora is not None:
        attach_lora(model, recipe.lora, mx.random.key(recipe.seed))
    stages = []
    for stage in recipe.stages:
        steps = stage_steps(stage, dataset)
        rows, tokens = largest(model, stage, dataset)
        memory = None
        if rows is not None:
            memory = memory_estimate(
                model, rows=rows, tokens=tokens, optimizer=stage.optimizer,
                gradient_checkpointing=stage.gradient_checkpointing,
            ).total
        stages.append(StagePlan(stage.stage, steps, rows, tokens, memory))
    return *count_parameters(model), stages


def largest(model, stage, dataset) -> tuple[int | None, int | None]:
    """(rows, tokens) of a stage's largest micro-batch, from the longest of a sample of its examples."""
    from mpi_mlx.documents import place_document
    from mpi_mlx.stages.supervised import encode_example

    if dataset is None or stage.stage == "pretrain":
        return None, None
    if stage.stage == "rl":
        examples = longest(dataset.rl or dataset.train)
        prompts = [
            len(model.encode(place_document(e.messages, None), tools=e.tools, generation_prompt=True).ids)
            for e in examples
        ]
        group = stage.group_size + stage.policy_aware
        at_once = max(group, min(stage.prompts * group, stage.micro_tokens // stage.max_completion_tokens))
        return (at_once, max(prompts) + stage.max_completion_tokens) if prompts else (None, None)
    carries = stage.stage == "cpt" or stage.document_fraction > 0
    document = dataset.document if carries else None
    rows = [
        len(encode_example(model, e, document, stage.stage, reasoning=stage.reasoning))
        for e in longest(dataset.train) if e.answer is not None
    ]
    return (stage.batch_size, max(rows)) if rows else (None, None)


def longest(examples) -> list:
    """The examples with the most text."""
    def text(example) -> int:
        return len(str(example.messages)) + len(example.reasoning or "") + len(example.answer or "")

    return sorted(examples, key=text, reverse=True)[:MEASURED]
