"""Every row as a model reads it: how long it is, or what is wrong with it, by file, line and field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mpi_mlx.data.completion import completion_text
from mpi_mlx.data.examples import Example
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError, ModelError

SAMPLED = 64  # rows of a generated split that are measured: drawing all of them could take an hour
_ASK = ({"role": "user", "content": "?"},)
_UNREADABLE = (DataError, ModelError)


@dataclass(frozen=True)
class Measured:
    """Tokens of the prompts and completions of ``rows`` rows; a line for each field that cannot be read."""

    rows: int
    prompts: tuple[int, ...]
    completions: tuple[int, ...]
    problems: tuple[str, ...]


def measure_rows(model, rows: Sequence[Example], step: Callable[[], None] = lambda: None) -> Measured:
    """Encodes the rows one by one, as training will; each distinct picture is decoded once.

    Of generated rows, which come from no file, at most SAMPLED. ``step`` is called after each.
    """
    rows = measured_rows(rows)
    prompts, completions, problems = [], [], []
    for example in rows:
        try:
            prompt = len(model.encode(example.messages, tools=example.tools, generation_prompt=True))
        except _UNREADABLE as error:
            problems += _row_problems(model, example, error)
        else:
            prompts.append(prompt)
            wrong = _turn_problems(model, example)
            problems += wrong
            if example.answer is not None and not wrong:
                completions.append(len(model.encode_completion(completion_text(example.reasoning, example.answer))))
        step()
    return Measured(len(rows), tuple(prompts), tuple(completions), tuple(problems))


def measured_rows(rows: Sequence[Example]) -> Sequence[Example]:
    """The rows that :func:`measure_rows` looks at."""
    if any(example.source is not None for example in rows):
        return rows
    return rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED]


def measure_document(model, document: PolicyDocument) -> tuple[int, tuple[str, ...]]:
    """(tokens that the document adds to a prompt, a line for each part of it that cannot be read)."""
    try:
        return len(model.encode(place_document(_ASK, document))) - len(model.encode(_ASK)), ()
    except _UNREADABLE as error:
        found = tuple(_document_problems(model, document))
        return 0, found or (f"{_document_name(document)}: {error}",)


def _row_problems(model, example: Example, error: Exception) -> list[str]:
    """What is wrong with each part that cannot be read by itself, else with the whole conversation."""
    found = [
        f"messages[{index}].content{place}: {said}"
        for index, message in enumerate(example.messages)
        for place, part in _parts(message["content"])
        if (said := _problem(model, part))
    ]
    return [f"{example.source or example.where}: {said}" for said in found or [str(error)]]


def _parts(content) -> Iterator[tuple[str, dict]]:
    if isinstance(content, str):
        yield "", {"type": "text", "text": content}
    else:
        for index, part in enumerate(content):
            yield f"[{index}].{part['type']}", part


def _problem(model, part: dict) -> str | None:
    try:
        model.encode([{"role": "user", "content": [part]}])
    except _UNREADABLE as error:
        return str(error)
    return None


def _turn_problems(model, example: Example) -> list[str]:
    """What is wrong with the fields of the turn that is to be learnt."""
    found = []
    for name, text in (("reasoning", example.reasoning), ("answer", example.answer)):
        try:
            model.encode_completion(text or "")
        except _UNREADABLE as error:
            found.append(f"{example.source or example.where}: {name}: {error}")
    return found


def _document_problems(model, document: PolicyDocument) -> Iterator[str]:
    token, files = model.parts.image_token, () if document.origin is None else document.origin.files
    for part in document.parts:
        said = _problem(model, part)
        lines = [
            f"{file}:{number}"
            for file in files
            for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1)
            if said and part["type"] == "text" and token and token in part["text"] and token in line
        ]
        if said:
            yield from (f"{where}: {said}" for where in lines or [_document_name(document)])


def _document_name(document: PolicyDocument) -> str:
    return f"document {document.name!r}" if document.origin is None else str(document.origin.path)
