"""`mpi-mlx data`: write the built-in benchmark as files, check a dataset and look at it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write the ClevrPolicy benchmark as files; check datasets.", no_args_is_help=True)

MEASURED = 64  # examples of a split whose tokens are counted


@app.command("clevr-policy")
def clevr_policy(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must not exist.")],
    depth: Annotated[int, typer.Option(help="Depth of the document's decision tree, 1 to 6.")] = 3,
    style: Annotated[str, typer.Option(help="flat (84 pixels, for tiny models) or clevr.")] = "flat",
    modality: Annotated[str, typer.Option(help="text, or multimodal (an illustrated document).")] = "text",
    train: Annotated[int, typer.Option(help="Labelled examples.")] = 8,
    rl: Annotated[int | None, typer.Option(help="Examples without traces; default: train's.")] = 2000,
    validation: Annotated[int, typer.Option(help="Held-out examples to watch.")] = 100,
    test: Annotated[int, typer.Option(help="Held-out examples to report.")] = 500,
    seed: Annotated[int, typer.Option(help="Of document and scenes: same seed, same bytes.")] = 7,
    document_seed: Annotated[int | None, typer.Option(help="Of the document alone.")] = None,
    wording: Annotated[str, typer.Option(help="natural, compact or mixed.")] = "natural",
    conditions: Annotated[str, typer.Option(help="Of exists,count,relation.")] = "exists",
    max_objects: Annotated[int, typer.Option(help="Objects of a scene, at most 9.")] = 5,
    image_size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    clevr: Annotated[Path | None, typer.Option(help="A CLEVR_v1.0 folder whose pictures to use.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --clevr: pictures read of each split.")] = None,
    model: Annotated[str | None, typer.Option(help="Base named in recipe.yaml.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that draw; 0: one a core.")] = 0,
) -> None:
    """A document, examples and pictures as plain files, and a recipe that trains on them."""
    from mpi_mlx.data.write import write_dataset, written_splits
    from mpi_mlx.errors import DataError

    if out.exists():
        raise DataError(f"{out}: exists already; choose another name or remove it")
    wanted = {
        "depth": depth, "style": "clevr" if clevr else style, "modality": modality, "train": train, "rl": rl,
        "validation": validation, "test": test, "seed": seed, "document_seed": document_seed,
        "wording": wording, "conditions": [kind.strip() for kind in conditions.split(",")],
        "max_objects": max_objects, "image_size": image_size,
    }
    spec = _benchmark(wanted)
    dataset = _built(spec, clevr, limit)
    if model is None:
        model = "embedded:tiny" if spec.style == "flat" and clevr is None else "Qwen/Qwen2.5-VL-3B-Instruct"
    recipe = recipe_text(out.name, dataset, model, _remade(out, wanted, clevr, limit))
    if workers < 1:  # flat pictures are drawn faster than processes start
        workers = 1 if spec.style == "flat" else os.cpu_count() or 1
    with _bar("drawing") as progress:
        write_dataset(out, dataset, recipe=recipe, workers=workers, progress=progress)
    counts = ", ".join(f"{name} {len(dataset.splits[name])}" for name in written_splits(dataset))
    typer.echo(f"{out}: document of {len(dataset.document.text)} characters; {counts}")
    typer.echo(f"next: mpi-mlx data check {out}   or   mpi-mlx train {out / 'recipe.yaml'}")


def _benchmark(wanted: dict):
    from pydantic import ValidationError

    from mpi_mlx.errors import DataError
    from mpi_mlx.recipe import BenchmarkData

    try:
        return BenchmarkData(benchmark="clevr_policy", **wanted)
    except ValidationError as error:
        said = [(str(e["loc"][0]).replace("_", "-"), e["msg"], e["input"]) for e in error.errors()]
        raise DataError("; ".join(f"--{name}: {why}, found {found!r}" for name, why, found in said)) from None


def _built(spec, clevr: Path | None, limit: int | None):
    if clevr is None:
        from mpi_mlx.data import load_dataset

        return load_dataset(spec)
    from mpi_mlx.data.clevr_photos import build_from_clevr

    return build_from_clevr(clevr, spec, limit=limit)


def _remade(out: Path, wanted: dict, clevr: Path | None, limit: int | None) -> str:
    """The command that writes the same files again."""
    said = [f"mpi-mlx data clevr-policy {out.name}"]
    for name, value in wanted.items():
        value = ",".join(value) if isinstance(value, list) else value
        if value is not None:
            said.append(f"--{name.replace('_', '-')} {value}")
    if clevr is not None:
        said.append(f"--clevr {clevr.name}" + ("" if limit is None else f" --limit {limit}"))
    return " ".join(said)


def recipe_text(name: str, dataset, model: str, command: str) -> str:
    """A recipe that trains on the files beside it."""
    from mpi_mlx.data.write import written_splits

    files = "".join(f", {split}: {split}.jsonl" for split in written_splits(dataset))
    tiny = model.startswith("embedded:")
    base = f"{{base: {model}}}" if tiny else f"{{base: {model}, quantize: 4}}"
    batch, rate = (16, "1.0e-3") if tiny else (4, "2.0e-4")
    tokens = max(len(e.reasoning or "") + len(e.answer or "") for e in dataset.train or dataset.rl)
    longest = -(-(tokens // 2 + 32) // 32) * 32  # tokens are longer than two characters
    return f"""\
# Written by: {command}
model: {base}
lora: {{rank: 16, alpha: 32}}
data: {{document: document{files}}}
stages:
  - {{stage: cpt, steps: 20, batch_size: {batch}, learning_rate: {rate}}}
  - {{stage: sft, steps: 60, batch_size: {batch}, learning_rate: {rate}, document_fraction: 0.25}}
  - stage: rl
    algorithm: grpo
    steps: 60
    prompts: 8
    group_size: 4
    policy_aware: 4
    policy_aware_sampler: reference
    learning_rate: {"4.0e-4" if tiny else "2.0e-5"}
    max_completion_tokens: {longest}
    rewards: [{{kind: exact_match, weight: 1.0}}, {{kind: format, weight: 0.1}}]
evaluation: {{batch_size: {64 if tiny else 8}}}
output: runs/{name}
seed: 0
"""


@app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A dataset folder, a JSONL of examples, or a recipe.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokens to count; default: the recipe's, else embedded:tiny.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Where to draw; default: beside PATH.")] = None,
    samples: Annotated[int, typer.Option(help="Examples on the sheet; 0 draws none.")] = 6,
    split: Annotated[str, typer.Option(help="Whose examples: train, rl, validation or test.")] = "train",
) -> None:
    """Validate lines and images, count, warn, and draw examples with each stage's trained tokens marked."""
    from mpi_mlx.data.check import check_dataset, read_source
    from mpi_mlx.errors import DataError

    source = read_source(path)
    report = check_dataset(source.dataset)
    rows = source.dataset.splits.get(split)
    if rows is None:
        raise DataError(f"--split {split}: expected train, rl, validation or test")
    if source.recipe is not None:
        name, pixels = model or source.recipe.model.base, source.recipe.model.max_pixels
    else:
        name, pixels = model or "embedded:tiny", None
    encoder = _encoder(name, pixels)
    lengths = {f.name: _lengths(encoder, source.dataset, f.name) for f in report.splits}
    _show(report, lengths, source.dataset, encoder)
    if samples > 0 and rows:
        target = sheet or _sheet_path(path)
        picture = _sheet(source, rows, samples, encoder, name, path)
        try:
            picture.save(target, format="PNG")
        except (OSError, ValueError) as error:
            raise DataError(f"{target}: cannot be written ({error})") from None
        typer.echo(f"sheet: {target}")


def _encoder(name: str, max_pixels: int | None):
    from mpi_mlx.models import load_model

    # Only the tokenizer and the processor are needed; random weights spare the embedded model's file.
    return load_model(name, max_pixels=max_pixels, **({"init": "random"} if name == "embedded:tiny" else {}))


def _stage_rows(model, example, document, reasoning: bool) -> dict:
    """By stage, what training makes of an example; without an answer, what a completion would follow."""
    import dataclasses

    from mpi_mlx.stages.supervised import encode_example

    labelled = example if example.answer is not None else dataclasses.replace(example, answer="")
    rows = {} if document is None else {"cpt": encode_example(model, labelled, document, "cpt")}
    for stage in ("sft", "rl"):
        rows[stage] = encode_example(model, labelled, None, stage, reasoning=reasoning or stage == "rl")
    return rows


def _lengths(model, dataset, split: str) -> dict:
    """Mean and longest prompt and completion over a sample of a split, in tokens."""
    from mpi_mlx.data.completion import completion_text

    rows = dataset.splits[split]
    step = max(1, len(rows) // MEASURED)
    picked = list(rows[::step][:MEASURED])
    prompts = [len(model.encode(e.messages, tools=e.tools, generation_prompt=True).ids) for e in picked]
    turns = [completion_text(e.reasoning, e.answer) for e in picked if e.answer is not None]
    completions = [len(model.encode_completion(turn)) for turn in turns]
    return {"prompt": prompts, "completion": completions, "of": len(picked)}


def _show(report, lengths: dict, dataset, model) -> None:
    from rich.console import Console
    from rich.table import Table

    from mpi_mlx.documents import place_document

    console = Console(highlight=False)
    if dataset.document is not None:
        ask = [{"role": "user", "content": "?"}]
        placed = len(model.encode(place_document(ask, dataset.document)).ids) - len(model.encode(ask).ids)
        characters, images = len(dataset.document.text), len(dataset.document.images)
        console.print(f"document: {characters} characters, {images} images, {placed} tokens in a prompt")
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "examples", "images", "traces", "answers", "majority", "prompt", "completion"):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for found in report.splits:
        measured = lengths[found.name]
        spans = [
            f"{sum(v) / len(v):.0f} / {max(v)}" if (v := measured[key]) else "-"
            for key in ("prompt", "completion")
        ]
        table.add_row(
            found.name, str(found.examples), str(found.images), str(found.with_reasoning),
            str(len(found.answers)), f"{found.majority:.0%}", *spans,
        )
    console.print(table)
    sampled = any(found.examples > lengths[found.name]["of"] for found in report.splits)
    on = f"; on {MEASURED} examples a split" if sampled else ""
    console.print(f"prompt, completion: tokens, mean / longest{on}")
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _sheet_path(path: Path) -> Path:
    return path / "sheet.png" if path.is_dir() else path.with_name(f"{path.stem}.sheet.png")


def _sheet(source, rows, samples: int, model, name: str, path: Path):
    from mpi_mlx.data.check import check_dataset
    from mpi_mlx.data.sheet import card_of, draw_sheet

    dataset = source.dataset
    stages = [] if source.recipe is None else source.recipe.stages
    reasoning = next((stage.reasoning for stage in stages if stage.stage == "sft"), True)
    picked = rows[:: max(1, len(rows) // samples)][:samples]
    decode = model.tokenizer.decode  # shows special tokens
    cards = [card_of(e, _stage_rows(model, e, dataset.document, reasoning), decode) for e in picked]
    counts = ", ".join(f"{f.name} {f.examples}" for f in check_dataset(dataset).splits)
    document = "no document"
    if dataset.document is not None:
        document = f"document of {len(dataset.document.text)} characters"
    facts = [f"{counts}; {document}; tokens of {name}"]
    return draw_sheet(cards, f"{path.resolve().name}: {len(cards)} of {len(rows)} examples", facts)


class _bar:
    """A progress bar that disappears; nothing where the output is no terminal."""

    def __init__(self, label: str):
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True, disable=not _terminal())
        self.task = self.progress.add_task(label, total=None)

    def __enter__(self):
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_) -> None:
        self.progress.stop()


def _terminal() -> bool:
    import sys

    return sys.stderr.isatty()
