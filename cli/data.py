"""`mpi-mlx data`: write the built-in benchmark as files, check a dataset and look at it."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

app = typer.Typer(help="Write the ClevrPolicy benchmark as files; check datasets.", no_args_is_help=True)

LISTED = 100  # errors that `data check` shows at most
NAMED = 6  # files that it names in one line


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
    from mpi_mlx.data import load_dataset
    from mpi_mlx.data.clevr_photos import build_from_clevr
    from mpi_mlx.data.recipe_text import recipe_text
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
    dataset = load_dataset(spec) if clevr is None else build_from_clevr(clevr, spec, limit=limit)
    if model is None:
        model = "embedded:tiny" if spec.style == "flat" and clevr is None else "Qwen/Qwen2.5-VL-3B-Instruct"
    command = _remade(out.name, {**wanted, "clevr": clevr, "limit": limit})
    recipe = recipe_text(out.name, dataset, model, command)
    if workers < 1:  # flat pictures are drawn faster than processes start
        workers = 1 if spec.style == "flat" else os.cpu_count() or 1
    with _bar("drawing") as progress:
        write_dataset(out, dataset, recipe=recipe, workers=workers, progress=progress)
    counts = ", ".join(f"{name} {len(dataset.splits[name])}" for name in written_splits(dataset))
    typer.echo(f"{out}: document of {len(dataset.document.text)} characters; {counts}")
    typer.echo(f"next: mpi-mlx data check {quote(str(out))}   or   mpi-mlx train {quote(str(out / 'recipe.yaml'))}")


def _benchmark(wanted: dict):
    from pydantic import ValidationError

    from mpi_mlx.errors import DataError
    from mpi_mlx.recipe import BenchmarkData

    try:
        return BenchmarkData(benchmark="clevr_policy", **wanted)
    except ValidationError as error:
        said = [(str(e["loc"][0]).replace("_", "-"), e["msg"], e["input"]) for e in error.errors()]
        raise DataError("; ".join(f"--{name}: {why}, found {found!r}" for name, why, found in said)) from None


def _remade(name: str, wanted: dict) -> str:
    """The command that writes the same files again."""
    said = [f"mpi-mlx data clevr-policy {name}"]
    for key, value in wanted.items():
        if value is not None:
            value = ",".join(value) if isinstance(value, list) else value
            said.append(f"--{key.replace('_', '-')} {value}")
    return " ".join(said)


@app.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A dataset folder, a JSONL of examples, or a recipe.")],
    model: Annotated[
        str | None, typer.Option(help="Whose tokens; default: the recipe's if local, else embedded:tiny.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Where to draw; default: beside PATH.")] = None,
    samples: Annotated[int, typer.Option(help="Examples on the sheet; 0 draws none.")] = 6,
    split: Annotated[str, typer.Option(help="Whose examples: train, rl, validation or test.")] = "train",
) -> None:
    """Validate lines and images, count, warn, and draw examples with each stage's trained tokens marked."""
    from mpi_mlx.data.check import check_dataset, read_source
    from mpi_mlx.errors import DataError

    source = read_source(path, thorough=False)  # pictures are decoded where they are measured
    report = check_dataset(source.dataset, whole=path.suffix not in (".jsonl", ".json"))
    rows = source.dataset.splits.get(split)
    if rows is None:
        raise DataError(f"--split {split}: expected train, rl, validation or test")
    encoder = _encoder(source.recipe, model)
    measured, problems = _measure(encoder, source.dataset, report)
    _show(report, measured, source.dataset, encoder)
    if problems:
        more = [f"... and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
        count = [f"{path}: {len(problems)} errors"] if len(problems) > 1 else []
        raise DataError("\n".join([*count, *problems[:LISTED], *more]))
    if samples > 0 and rows:
        target = sheet or _sheet_path(path)
        picture = _sheet(source, rows, samples, encoder, path)
        try:
            picture.save(target, format="PNG")
        except (OSError, ValueError) as error:
            raise DataError(f"{target}: cannot be written ({error})") from None
        typer.echo(f"sheet: {target}")


def _encoder(recipe, wanted: str | None):
    """The model whose tokens are counted. Nothing is downloaded unless it was asked for by name."""
    from mpi_mlx.models import load_model

    named = recipe and recipe.model
    if wanted is None and named and (named.base.startswith("embedded:") or Path(named.base).is_dir()):
        wanted = named.base
    if wanted is None and named:
        typer.echo(f"counting tokens of embedded:tiny; --model {named.base} counts the recipe's own")
    name = wanted or "embedded:tiny"
    # Only tokenizer and image processor are used; random weights spare the embedded model's.
    init = named.init if named and named.base == name else "weights"
    if name == "embedded:tiny":
        init = "random"
    return load_model(name, max_pixels=named.max_pixels if named else None, init=init)


def _stage_rows(model, example, document, reasoning: bool) -> dict:
    """By stage, what training makes of an example; without an answer, what a completion would follow."""
    import dataclasses

    from mpi_mlx.stages.supervised import encode_example

    labelled = example if example.answer is not None else dataclasses.replace(example, answer="")
    rows = {} if document is None else {"cpt": encode_example(model, labelled, document, "cpt")}
    for stage in ("sft", "rl"):
        rows[stage] = encode_example(model, labelled, None, stage, reasoning=reasoning or stage == "rl")
    return rows


def _measure(model, dataset, report) -> tuple[dict, list[str]]:
    """By split, what its rows come to in tokens, and the document's tokens; all that cannot be read."""
    from mpi_mlx.data.measure import measure_document, measure_rows, measured_rows
    from mpi_mlx.errors import DataError
    from mpi_mlx.models.context import check_context

    measured, problems = {}, []
    if dataset.document is not None:
        measured["document"], found = measure_document(model, dataset.document)
        problems += found
        try:
            check_context(model, measured["document"], "document", advice="shorten it")
        except DataError as error:
            problems.append(str(error))
    total, done = sum(len(measured_rows(dataset.splits[f.name])) for f in report.splits), 0
    with _bar("reading") as progress:

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        for found in report.splits:
            measured[found.name] = measure_rows(model, dataset.splits[found.name], step)
            problems += measured[found.name].problems
    return measured, problems


def _show(report, measured: dict, dataset, model) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    if dataset.document is not None:
        characters, images = len(dataset.document.text), len(dataset.document.images)
        placed = measured["document"]
        console.print(f"document: {characters} characters, {images} images, {placed} tokens in a prompt")
        for line in _files(dataset.document):
            console.print(line, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for heading in ("split", "examples", "images", "traces", "answers", "majority", "prompt", "completion"):
        table.add_column(heading, justify="left" if heading == "split" else "right", no_wrap=True)
    for found in report.splits:
        tokens = measured[found.name]
        spans = [f"{sum(v) / len(v):.0f} / {max(v)}" if v else "-" for v in (tokens.prompts, tokens.completions)]
        table.add_row(
            found.name, str(found.examples), str(found.images), str(found.with_reasoning),
            str(len(found.answers)), f"{found.majority:.0%}", *spans,
        )
    console.print(table)
    most = max((measured[f.name].rows for f in report.splits if measured[f.name].rows < f.examples), default=0)
    on = f"; on {most} examples a split" if most else ""
    console.print(f"prompt, completion: tokens of {model.base}, mean / longest{on}", soft_wrap=True)
    for warning in report.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"), soft_wrap=True)


def _files(document) -> list[str]:
    """What was read of the document's folder, in order, and what was not."""
    from mpi_mlx.documents import unread_files

    if document.origin is None:
        return []
    named = {"read": [file.name for file in document.origin.files]}
    named["not read or shown"] = [str(file) for file in unread_files(document)]
    return [
        f"  {what}: {', '.join(names[:NAMED])}" + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        for what, names in named.items()
        if names
    ]


def _sheet_path(path: Path) -> Path:
    return path / "sheet.png" if path.is_dir() else path.with_name(f"{path.stem}.sheet.png")


def _sheet(source, rows, samples: int, model, path: Path):
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
    facts = [f"{counts}; {document}; tokens of {model.base}"]
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
