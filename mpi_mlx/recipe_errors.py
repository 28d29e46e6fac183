"""One line for each thing wrong with a recipe: where, what was found, what is allowed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from mpi_mlx.recipe_fields import Spec
from mpi_mlx.recipe_schema import (
    BenchmarkData,
    EvaluationSpec,
    LoggingSpec,
    LoraSpec,
    ModelSpec,
    OwnData,
    Recipe,
    data_kind,
)
from mpi_mlx.recipe_stages import (
    CptStage,
    ExactMatchReward,
    FormatReward,
    FunctionReward,
    JsonReward,
    PretrainStage,
    RegexReward,
    RlStage,
    SftStage,
    ToolCallReward,
    TraceReward,
)
from mpi_mlx.recipe_yaml import Document, Keys

STAGES = {"cpt": CptStage, "sft": SftStage, "rl": RlStage, "pretrain": PretrainStage}
REWARDS = {
    "exact_match": ExactMatchReward, "format": FormatReward, "regex": RegexReward,
    "tool_call": ToolCallReward, "json": JsonReward, "trace": TraceReward, "function": FunctionReward,
}  # fmt: skip
_PARTS = {"model": ModelSpec, "lora": LoraSpec, "evaluation": EvaluationSpec, "logging": LoggingSpec}
_ELSEWHERE = {
    ("rl", "epochs"): "rl counts steps; set steps",
    ("rl", "batch_size"): "rl has prompts x (group_size + policy_aware) completions a step; set those",
    ("rl", "accumulate"): "set micro_tokens, the tokens of one forward",
    ("pretrain", "epochs"): "its rows are drawn without end; set steps",
    ("pretrain", "accumulate"): "set rows_per_micro and documents_per_micro",
}
_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "string_too_short": "some text",
    "too_short": "a list or mapping that is not empty",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}


def error_lines(document: Document, errors: Sequence[dict]) -> list[str]:
    """``errors`` of pydantic (and the document's own), one line each, in the order of the file."""
    kept = described(document.raw, errors)
    lines = [f"{document.place(path)}: {_dotted(path)}: {said}" for path, said in kept]
    return sorted({*document.errors, *lines}, key=_by_line)


def _dotted(path: Keys) -> str:
    return ".".join(map(str, path)) or "recipe"


def described(raw: Any, errors: Sequence[dict]) -> list[tuple[Keys, str]]:
    """Where ``raw`` is wrong, and what is: pydantic's ``errors`` in this project's words."""
    found: list[tuple[Keys, str]] = []
    for error in errors:
        path = _path(error["loc"])
        if error["type"] == "too_short" and error["input"]:  # only because its bad items do not count
            continue
        if error["type"] == "contradiction":
            for dotted, said in error["ctx"]["problems"]:
                inner = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
                found.append(((*path, *inner), said))
        elif error["type"] != "too_short" or not error["input"]:  # else each of its items is wrong
            found.append(_said(error, path, raw))
    guessed = {said.rpartition("did you mean ")[2].strip('"?') + str(path[:-1]) for path, said in found}
    return [(p, s) for p, s in found if not (s.startswith("missing") and str(p[-1]) + str(p[:-1]) in guessed)]


def mended(raw: dict, errors: Sequence[dict]) -> tuple[dict, set[Keys]]:
    """``raw`` without what is wrong in it, and the paths of what was left out (misspelt ones put right).

    Contradictions are looked for where all values are right: in this copy the rest of them shows.
    """
    raw, gone = copy.deepcopy(raw), set()
    for error in errors:
        path = _path(error["loc"])
        while path and not isinstance(_at(raw, path[:-1]), dict):
            path = path[:-1]
        owner = _at(raw, path[:-1])
        if not path or path == ("stages",) or error["type"] == "missing" or path[-1] not in owner:
            continue
        if error["type"] == "contradiction" or error["type"].startswith("union_tag"):
            continue
        meant = path
        if error["type"] == "extra_forbidden":
            near = get_close_matches(str(path[-1]), list(fields_of(path[:-1], raw)), 1)
            meant = (*path[:-1], near[0] if near else path[-1])
        if meant == ("data", "benchmark"):  # without it the others would be taken for one's own files
            owner, path, meant = raw, ("data",), ("data",)
        owner.pop(path[-1], None)
        gone.add(meant)
    return raw, gone


def stands(error: dict, gone: set[Keys]) -> dict | None:
    """A contradiction of a mended recipe, without those problems that may be due to what was left out."""
    if error["type"] != "contradiction":
        return None
    outer = _path(error["loc"])
    kept = []
    for dotted, said in error["ctx"]["problems"]:
        path = (*outer, *(int(part) if part.isdigit() else part for part in dotted.split(".")))
        # The message names all keys that it is about.
        if path not in gone and not any(str(g[-1]) in said for g in gone):
            kept.append((dotted, said))
    return {**error, "ctx": {**error["ctx"], "problems": kept}}


def _by_line(line: str) -> tuple:
    parts = line.split(":", 2)
    return (0, int(parts[1]), line) if len(parts) > 2 and parts[1].isdigit() else (1, 0, line)


def _path(loc: Sequence[str | int]) -> Keys:
    """Pydantic's location without the names of union members and marks of dictionary keys."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        before = tuple(loc[:i])
        listed = len(before) >= 2 and before[-2] in ("stages", "rewards") and isinstance(before[-1], int)
        union = before == ("data",) or listed
        if not union and part != "[key]":
            path.append(part)
    return tuple(path)


def _said(error: dict, path: Keys, raw: Any) -> tuple[Keys, str]:
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "extra_forbidden":
        return path, _unknown(path, raw)
    if kind == "missing":
        field = fields_of(path[:-1], raw).get(path[-1])
        return path, "missing" + (f"; {field.description}" if field else "")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, context["discriminator"].strip("'"))
        allowed = list(STAGES if path[0] == "stages" and len(path) == 3 else REWARDS)
        found = error["input"].get(path[-1]) if isinstance(error["input"], dict) else error["input"]
        if kind == "union_tag_not_found":
            return path, f"missing; allowed: {', '.join(allowed)}"
        return path, f"found {_shown(found)}, allowed: {', '.join(allowed)}{_guess(found, allowed)}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        guess = _guess(error["input"], allowed.split(", "))
        return path, f"found {_shown(error['input'])}, allowed: {allowed}{_null(path, raw)}{guess}"
    allowed = _ALLOWED.get(kind)
    allowed = allowed.format(**context) if allowed else error["msg"]
    return path, f"found {_shown(error['input'])}, allowed: {allowed}{_null(path, raw)}"


def _unknown(path: Keys, raw: Any) -> str:
    known = list(fields_of(path[:-1], raw))
    stage = _at(raw, (*path[:2], "stage")) if path[0] == "stages" and len(path) == 3 else None
    elsewhere = _ELSEWHERE.get((stage, path[-1])) if isinstance(stage, str) else None
    if elsewhere:
        return f"unknown key here: {elsewhere}"
    others = [kind for kind, spec in STAGES.items() if path[-1] in spec.model_fields]
    if path[0] == "stages" and len(path) == 3 and others:
        return f"unknown key here: only {' and '.join(others)} {'has' if len(others) == 1 else 'have'} it"
    return f"unknown key{_guess(path[-1], known) or '; allowed: ' + ', '.join(known)}"


def _guess(word: Any, known: Sequence[str]) -> str:
    near = get_close_matches(str(word), known, 1, 0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _null(path: Keys, raw: Any) -> str:
    """Whether null is allowed at ``path``, too."""
    field = fields_of(path[:-1], raw).get(path[-1]) if path else None
    return " or null" if field is not None and type(None) in getattr(field.annotation, "__args__", ()) else ""


def fields_of(path: Keys, raw: Any) -> dict:
    """Name -> pydantic field of the mapping at ``path`` of the recipe ``raw``."""
    spec = _spec(path, raw)
    return {} if spec is None else dict(spec.model_fields)


def _spec(path: Keys, raw: Any) -> type[Spec] | None:
    value = _at(raw, path)
    if not path:
        return Recipe
    if path == ("data",):
        return BenchmarkData if data_kind(value) == "benchmark" else OwnData
    if len(path) == 1:
        return _PARTS.get(path[0])
    if isinstance(value, dict) and path[0] == "stages" and len(path) in (2, 4):
        kinds, key = (STAGES, "stage") if len(path) == 2 else (REWARDS, "kind")
        kind = value.get(key)
        return kinds.get(kind) if isinstance(kind, str) else None
    return None


def _at(raw: Any, path: Keys) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
