"""The ablation's grid: named variants of one recipe, and a study's cells (variant x document x setting)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from mpi_mlx.errors import RecipeError
from mpi_mlx.recipe_errors import described
from mpi_mlx.recipe_stages import CptStage, RlStage, SftStage

BASE = "base"
FIELDS = {"cpt": CptStage.model_fields, "sft": SftStage.model_fields, "rl": RlStage.model_fields}
OF_A_PROCESS = {"cpt": ("accumulate",), "sft": ("accumulate",), "rl": ("prompts", "sft_batch_size")}
# Of no use to another algorithm: what its name sets (a resolved recipe has that written out), and terms it may lack.
OF_AN_ALGORITHM = (
    "clip_low", "clip_high", "dual_clip", "aggregation", "kl_coef", "scale_advantages", "drop_constant", "refill",
)
TOKENS_PER_LEVEL = 12  # of a trace: a section's name, its question and the answer to it
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class StageChange:
    """A stage of the recipe, by kind, with other values for some of its fields."""

    kind: str  # cpt, sft, rl
    changes: Mapping[str, Any] = field(default_factory=lambda: _NONE)


@dataclass(frozen=True)
class Variant:
    """A row of the table. Its stages are a prefix of other variants' where training can be shared."""

    name: str
    title: str
    stages: tuple[StageChange, ...] = ()


CPT = StageChange("cpt")
SFT = StageChange("sft")
SFT_BARE = StageChange("sft", {"document_fraction": 0.0})
DIRECT = StageChange("sft", {"reasoning": False})
BOTH = "cpt+sft"  # as a value: what the two stages of the recipe have together

# Every form of RL draws the same number of completions a prompt; see ``_rl_changes``.
STARTS = (
    ("direct_sft", "direct SFT", (DIRECT,)),
    ("sft", "CoT-SFT", (SFT,)),
    ("cpt_sft", "VM-CPT + CoT-SFT", (CPT, SFT)),
)
FORMS = (
    ("grpo", "GRPO", {"algorithm": "grpo", "policy_aware": 0}),
    ("policyrollout", "PolicyRollout", {"algorithm": "grpo"}),
    ("dapo_policyrollout", "DAPO with PolicyRollout", {"algorithm": "dapo"}),
)
# Beyond the table: the policy-aware half drawn by the model with its adapters on and off, SFT without any row that
# carries the document, SFT for the steps (and the rows with the document) of continual pretraining as well, and forms
# of continual pretraining, each beside SFT of as many steps and as many rows with the document.
MATCHED = {"steps": BOTH, "document_fraction": BOTH}
MORE_STARTS = (
    ("sft_matched", "CoT-SFT, steps of both", (StageChange("sft", {"steps": BOTH}),)),
    ("sft_matched_rows", "CoT-SFT, steps and document rows of both", (StageChange("sft", MATCHED),)),
    ("sft_bare", "CoT-SFT, no document rows", (SFT_BARE,)),
    ("cpt_sft_bare", "VM-CPT + CoT-SFT, no document rows", (CPT, SFT_BARE)),
)
MORE_FORMS = tuple(
    (f"policyrollout_{who}", f"PolicyRollout ({who})", {"algorithm": "grpo", "policy_aware_sampler": who})
    for who in ("model", "reference")
)
CPT_FORMS = (
    ("plain", ", nothing recited", {"document_questions": 0.0}),
    ("long", ", three times the steps", {"steps": 3}),
)


def _variants() -> dict[str, Variant]:
    found = [Variant(BASE, "base")]
    for start, start_title, stages in (*STARTS, *MORE_STARTS):
        found.append(Variant(start, start_title, stages))
        direct = start == "direct_sft"  # its policy-aware half has one sampler: see ``_rl_changes``
        for form, form_title, changes in FORMS if direct else (*FORMS, *MORE_FORMS):
            if direct:
                changes = {**changes, "reasoning": False}
            chain = (*stages, StageChange("rl", changes))
            found.append(Variant(f"{start}+{form}", f"{start_title} + {form_title}", chain))
    for form, said, changes in CPT_FORMS:
        found.append(Variant(f"cpt_{form}_sft", f"VM-CPT{said} + CoT-SFT", (StageChange("cpt", changes), SFT)))
        matched = {**MATCHED, **{f"cpt.{k}": v for k, v in changes.items()}}
        title = f"CoT-SFT, steps and document rows of both{said}"
        found.append(Variant(f"sft_matched_{form}", title, (StageChange("sft", matched),)))
    return {v.name: v for v in found}


VARIANTS = _variants()
TABLE = (BASE, *(name for s, _, _ in STARTS for name in (s, *(f"{s}+{f}" for f, _, _ in FORMS))))
CURVES = (BASE, "sft", "cpt_sft", "cpt_sft+grpo", "cpt_sft+policyrollout")


def choose_variants(names: Sequence[str]) -> tuple[Variant, ...]:
    """Variants by name, in the given order. Raises RecipeError with a suggestion."""
    unknown = [n for n in names if n not in VARIANTS]
    if unknown:
        near = get_close_matches(unknown[0], VARIANTS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(VARIANTS)}"
        raise RecipeError(f"ablation: no variant {unknown[0]!r}; {hint}")
    return tuple(VARIANTS[n] for n in names)


@dataclass(frozen=True)
class Cell:
    """One training: a variant on one document, in one setting (``{"data.depth": 3, "data.train": 8}``)."""

    variant: Variant
    document: int
    setting: tuple[tuple[str, Any], ...] = ()

    @property
    def folder(self) -> str:
        """``depth=3,train=8/document-101/sft+grpo``."""
        setting = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in self.setting) or "recipe"
        return f"{setting}/document-{self.document}/{self.variant.name}"


def plan(
    base,
    variants: Sequence[Variant],
    documents: Sequence[int],
    sweeps: Mapping[str, Sequence[Any]] = _NONE,
    sweep_variants: Sequence[Variant] = (),
) -> list[Cell]:
    """All cells: the table's, then each sweep's (``{"data.depth": [2, 3, 4]}``) with ``sweep_variants``.

    A sweep's value that the recipe ``base`` already has is the table's own setting and runs once. Shorter
    chains come before those that continue them, so that these can fork; each document's cells stand together,
    so that a study cut short has whole documents.
    """
    cells: list[Cell] = []
    settings: list[tuple[tuple, Sequence[Variant]]] = [((), variants)]
    for key, values in sweeps.items():
        settings += [(sweep_setting(base, key, value), sweep_variants) for value in values]
    for setting, chosen in settings:
        for document in documents:
            cells += sorted((Cell(v, document, setting) for v in chosen), key=lambda c: len(c.variant.stages))
    return list({cell.folder: cell for cell in cells}.values())


def sweep_setting(base, key: str, value: Any) -> tuple[tuple[str, Any], ...]:
    """The setting of a sweep's point: empty where the recipe has that value itself."""
    return () if recipe_value(base, key) == value else ((key, value),)


def recipe_value(base, key: str) -> Any:
    """``data.depth`` of a recipe; None where there is no such field."""
    for part in key.split("."):
        base = getattr(base, part, None)
    return base


def cell_recipe(base, cell: Cell, output: str):
    """The recipe of a cell: ``base`` (a Recipe) with the variant's stages, the cell's document and setting.

    The document and its scenes come from the cell's number (``data.seed``), and so does the run's ``seed``.
    Deeper documents get more room for their longer traces. A cell is one process, so what the recipe counts
    for each of its ``processes`` is counted for all of them here.

    Raises:
        RecipeError: ``base`` lacks a stage that the variant needs, or a setting does not exist.
    """
    raw = base.model_dump(mode="json", exclude_unset=True)
    known: dict[str, dict] = {}
    for stage in raw["stages"]:
        known.setdefault(stage["stage"], stage)
    if cell.variant.stages:  # base trains nothing and keeps the recipe's, unused
        raw["stages"] = [_stage(change, known) for change in cell.variant.stages]
    raw["seed"] = cell.document
    processes = raw.pop("processes", 1)  # a study is spread over processes by document (part_of)
    for stage in raw["stages"] if processes > 1 else ():
        for name in OF_A_PROCESS.get(stage["stage"], ()):
            stage[name] = processes * _value(stage, name)
    if "benchmark" in raw["data"]:
        raw["data"]["seed"] = cell.document
        raw["data"].pop("document_seed", None)
    for key, value in cell.setting:
        _put(raw, key, value)
    deeper = dict(cell.setting).get("data.depth", 0) - (recipe_value(base, "data.depth") or 0)
    raw["evaluation"] = {**raw.get("evaluation", {}), "after": [raw["stages"][-1]["stage"]]}
    if deeper > 0:
        for block in (raw["evaluation"], *raw["stages"]):
            if "max_completion_tokens" in block:
                block["max_completion_tokens"] += TOKENS_PER_LEVEL * deeper
    raw["output"] = output
    try:
        recipe = type(base).model_validate(raw, context={"folder": base.folder})
    except ValidationError as error:
        found = described(raw, error.errors(include_url=False))
        said = "; ".join(f"{'.'.join(map(str, path))}: {words}" for path, words in found)
        raise RecipeError(f"ablation: {cell.folder} is not a recipe that can run: {said}") from None
    recipe._folder = base.folder
    return recipe


def _value(stage: Mapping, name: str) -> Any:
    """A field of a stage as a recipe writes it, or its default."""
    return stage.get(name, FIELDS[stage["stage"]][name].default)


def _stage(change: StageChange, known: Mapping[str, dict]) -> dict:
    if change.kind not in known:
        known_kinds = ", ".join(known) or "none"
        raise RecipeError(f"ablation: a variant needs stage {change.kind}; the recipe has {known_kinds}")
    stage, changes = dict(known[change.kind]), dict(change.changes)
    if changes.get("steps") == BOTH:
        changes = _matched(stage, known.get("cpt", {}), changes)
    if change.kind == "cpt" and "steps" in changes:
        changes["steps"] *= stage.get("steps", 0)
    if change.kind == "rl":
        changes = _rl_changes(stage, changes)
    return {**stage, **changes}


def _matched(sft: dict, cpt: dict, changes: dict) -> dict:
    """SFT for the steps of both stages and, where wanted, with as many rows that carry the document.

    A step of cpt counts as so many of sft as it takes rows. Texts to rehearse are rows that carry nothing.
    Names with ``cpt.`` change the cpt stage that is matched; its ``steps`` are a factor.
    """
    if "steps" not in sft or "steps" not in cpt or _value(sft, "batch_size") != _value(cpt, "batch_size"):
        raise RecipeError(
            "ablation: sft_matched needs stages cpt and sft with one batch_size, and steps instead of epochs"
        )
    forwards = _value(sft, "accumulate")
    before = cpt["steps"] * changes.get("cpt.steps", 1) * _value(cpt, "accumulate")  # forwards, too
    steps = sft["steps"] + -(-before // forwards)
    out = {"steps": steps}
    if "document_fraction" in changes:
        asked = changes.get("cpt.document_questions", _value(cpt, "document_questions"))
        labelled = 1 - _value(sft, "rehearsal")
        rows = before * (1 - _value(cpt, "rehearsal")) * (1 - asked)
        rows += sft["steps"] * forwards * labelled * _value(sft, "document_fraction")
        share = round(rows / (steps * forwards * labelled), 4)
        if share > 1:
            raise RecipeError(
                f"ablation: sft cannot have the document in as many rows as cpt and sft: {share:.0%} of its labelled "
                "rows; lower the sft stage's rehearsal"
            )
        out["document_fraction"] = share
    return out


def _rl_changes(stage: dict, changes: dict) -> dict:
    """Without policy-aware completions the group is as large as the union would be.

    What an algorithm sets by default (clipping, aggregation, dropping and refilling) is left to its default when it
    is changed. Where no trace is wanted none is drawn from the base, which would open with one, and none is paid.
    """
    both = _value(stage, "group_size") + _value(stage, "policy_aware")
    if changes.get("policy_aware") == 0:
        changes["group_size"] = both
        stage.pop("importance_weight", None)  # there is nothing left to weigh
    elif not stage.get("policy_aware"):
        changes |= {"group_size": both - both // 2, "policy_aware": both // 2}
    if changes.get("algorithm", "grpo") != _value(stage, "algorithm"):
        for name in OF_AN_ALGORITHM:
            stage.pop(name, None)
    if not changes.get("reasoning", _value(stage, "reasoning")):
        changes.setdefault("policy_aware_sampler", "model")
        if "rewards" in stage:
            changes["rewards"] = [reward for reward in stage["rewards"] if reward["kind"] != "trace"]
    return changes


def _put(raw: dict, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        raw = raw.setdefault(part, {})
    raw[last] = value


def fork_parent(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell with the longest chain of stages that this one continues, on the same document and setting."""
    def continues(other: Cell) -> bool:
        mine, its = cell.variant.stages, other.variant.stages
        same_place = (other.document, other.setting) == (cell.document, cell.setting)
        return same_place and 0 < len(its) < len(mine) and mine[: len(its)] == its

    return max((c for c in cells if continues(c)), key=lambda c: len(c.variant.stages), default=None)


def part_of(cells: Sequence[Cell], part: int, parts: int) -> Iterator[Cell]:
    """The cells of every ``parts``-th document, so that processes can share a study without waiting."""
    documents = list(dict.fromkeys(c.document for c in cells))
    mine = set(documents[part - 1 :: parts])
    return (c for c in cells if c.document in mine)
