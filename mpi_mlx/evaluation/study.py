"""What an ablation's cells say together: means over documents, differences in pairs, curves.

With a benchmark a cell's number is a document with its own test examples. With one's own files it is a seed of
training, and every cell is tested on the same examples (``shared``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpi_mlx.evaluation.grid import BASE, CPT_FORMS, FORMS, MORE_FORMS, MORE_STARTS, STARTS, VARIANTS
from mpi_mlx.evaluation.metrics import (
    Mean,
    difference_variance,
    mean_over_seeds,
    paired_difference,
    proportion_variance,
    right_answers,
)

Setting = tuple[tuple[str, Any], ...]
MATCHED_STARTS = ("sft_matched", "sft_matched_rows")  # what continual pretraining is measured against
FEWEST = 3  # documents; the spread of two says next to nothing


@dataclass(frozen=True)
class CellResult:
    """What one cell measured. Shares in 0..1; ``seconds`` of training, shared stages included.

    ``format_rate``: of answers without the document, in the form that the cell trains. ``right``: which examples
    were, by id, without the document; None where that was not kept.
    """

    variant: str
    document: int
    setting: Setting
    accuracy: float
    accuracy_with_document: float | None
    trace_match: float | None
    trace_consistent: float | None
    majority: float
    n: int
    seconds: float
    format_rate: float | None = None
    right: Mapping[str, bool] | None = field(default=None, repr=False)

    @classmethod
    def from_run(
        cls,
        variant: str,
        document: int,
        setting: Setting,
        rows: Sequence[dict],
        seconds: float,
        predictions: Sequence[dict] = (),
    ) -> CellResult:
        """From the rows of a cell's results.json, and its predictions: those of its last model."""
        last = rows[-1]["model"]
        of_last = {r["document_in_context"]: r for r in rows if r["model"] == last}
        bare, carried = of_last[False], of_last.get(True)
        return cls(
            variant=variant,
            document=document,
            setting=setting,
            accuracy=bare["accuracy"],
            accuracy_with_document=carried["accuracy"] if carried else None,
            trace_match=bare["trace_match"],
            trace_consistent=bare.get("trace_consistent"),
            majority=bare.get("majority") or 0.0,
            n=bare["n"],
            seconds=seconds,
            format_rate=bare.get("format_rate"),
            right=right_answers(predictions, last, False) or None,
        )

    def figures(self) -> dict:
        """As JSON keeps it: without the single answers."""
        return {name: value for name, value in asdict(self).items() if name != "right"}


@dataclass(frozen=True)
class Summary:
    """A variant in one setting, over documents."""

    variant: str
    setting: Setting
    accuracy: Mean
    accuracy_with_document: Mean | None
    trace_match: Mean | None
    trace_consistent: Mean | None
    format_rate: Mean | None
    majority: float
    examples: int
    documents: tuple[int, ...]
    seconds: float

    @property
    def title(self) -> str:
        return VARIANTS[self.variant].title


def summarise(results: Sequence[CellResult], *, shared: bool = False) -> list[Summary]:
    """One summary for each (setting, variant), in the order in which they first appear."""
    groups: dict[tuple[Setting, str], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.setting, result.variant), []).append(result)
    return [_summary(found, shared) for found in groups.values()]


def _summary(found: Sequence[CellResult], shared: bool) -> Summary:
    def mean(name: str) -> Mean | None:
        pairs = [(getattr(r, name), r.n) for r in found if getattr(r, name) is not None]
        if not pairs:
            return None
        return mean_over_seeds([v for v, _ in pairs], [proportion_variance(*p) for p in pairs], shared=shared)

    return Summary(
        variant=found[0].variant,
        setting=found[0].setting,
        accuracy=mean("accuracy"),
        accuracy_with_document=mean("accuracy_with_document"),
        trace_match=mean("trace_match"),
        trace_consistent=mean("trace_consistent"),
        format_rate=mean("format_rate"),
        majority=sum(r.majority for r in found) / len(found),
        examples=sum(r.n for r in found),
        documents=tuple(r.document for r in found),
        seconds=sum(r.seconds for r in found) / len(found),
    )


def comparisons() -> list[tuple[str, str]]:
    """(variant, what it is compared with): each addition against what it is added to."""
    pairs = [("cpt_sft", other) for other in ("sft", *MATCHED_STARTS)]
    pairs += [(f"cpt_{form}_sft", f"sft_matched_{form}") for form, _, _ in CPT_FORMS]
    pairs += [("sft", "direct_sft")]
    for start, _, _ in (*STARTS, *MORE_STARTS):
        pairs += [(f"{start}+{form}", start) for form, _, _ in FORMS]
        aware = [form for form, _, _ in (*FORMS, *MORE_FORMS) if form != "grpo"]
        pairs += [(f"{start}+{form}", f"{start}+grpo") for form in aware]
    pairs += [(f"cpt_sft+{form}", f"{sft}+{form}") for sft in ("sft", *MATCHED_STARTS) for form, _, _ in FORMS]
    return pairs


@dataclass(frozen=True)
class Difference:
    """Mean of variant - other, in accuracy without the document, over the documents that both have."""

    variant: str
    other: str
    setting: Setting
    mean: Mean

    @property
    def certain(self) -> bool:
        """The 95% interval does not hold zero, and is of enough documents to be one."""
        if self.mean.interval is None or self.mean.n < FEWEST:
            return False
        return self.mean.interval[0] > 0 or self.mean.interval[1] < 0


def differences(results: Sequence[CellResult], *, shared: bool = False) -> list[Difference]:
    """All comparisons that the results allow, paired by document; no surer than the test sets allow."""
    table: dict[tuple[Setting, str], dict[int, CellResult]] = {}
    for r in results:
        table.setdefault((r.setting, r.variant), {})[r.document] = r
    out = []
    for setting in dict.fromkeys(r.setting for r in results):
        for variant, other in comparisons():
            a, b = table.get((setting, variant), {}), table.get((setting, other), {})
            sampling = {d: _sampling(a[d], b[d]) for d in a if d in b}
            if sampling:
                shares = ({d: r.accuracy for d, r in side.items()} for side in (a, b))
                out.append(Difference(variant, other, setting, paired_difference(*shares, sampling, shared=shared)))
    return out


def _sampling(a: CellResult, b: CellResult) -> float:
    return difference_variance((a.accuracy, a.n), (b.accuracy, b.n), a.right, b.right)


@dataclass(frozen=True)
class Curve:
    """A line of a figure: accuracy against ``x``; ``title`` names it."""

    title: str
    x: tuple[float, ...]
    means: tuple[Mean, ...]


def curves(
    summaries: Sequence[Summary], settings: Mapping[Any, Setting], variants: Sequence[str]
) -> tuple[list[Curve], Curve | None]:
    """The variants' accuracies without the document over a sweep, and the base's with it.

    ``settings``: the sweep's values with the settings that stand for them.
    """
    known = {(s.setting, s.variant): s for s in summaries}
    lines, ceiling = [], None
    for name in variants:
        found = [(x, known[setting, name]) for x, setting in settings.items() if (setting, name) in known]
        if not found:
            continue
        if name == BASE:
            carried = [(x, s.accuracy_with_document) for x, s in found if s.accuracy_with_document]
            if carried:
                ceiling = Curve("base, document in context", *zip(*carried, strict=True))
            continue
        x, means = tuple(x for x, _ in found), tuple(s.accuracy for _, s in found)
        lines.append(Curve(VARIANTS[name].title, x, means))
    return lines, ceiling


def majority_curve(summaries: Sequence[Summary], settings: Mapping[Any, Setting]) -> Curve:
    """What the most frequent answer earns over a sweep."""
    known = {s.setting: s.majority for s in summaries}
    found = [(x, Mean(known[s], None, 1)) for x, s in settings.items() if s in known]
    return Curve("most frequent answer", *(tuple(v) for v in zip(*found, strict=True)))
