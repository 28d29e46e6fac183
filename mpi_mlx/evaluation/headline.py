"""The sentences at the top of a report, computed from the rows; they say it plainly when it did not work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mpi_mlx.evaluation.figures import prompt_cost, stage_title
from mpi_mlx.evaluation.metrics import Z95, difference_variance, right_answers
from mpi_mlx.evaluation.results import find_row

CLOSE = 0.03  # so little below the base with the document is no loss, even where it is certain
UNSEEN = 0.10  # a loss of so much must not be within the test set's error
GOOD = 0.80  # less than this is not called internalized, whatever it is compared with
TRUSTED_TRACE = 0.85


def final_row(rows: Sequence[dict]) -> dict | None:
    """The last trained model without the document."""
    trained = [r for r in rows if r["model"] != "base" and not r["document_in_context"]]
    return trained[-1] if trained else None


def headline(rows: Sequence[dict], predictions: Sequence[dict] = ()) -> str:
    """One or two sentences: did the last stage's model learn the document, beside what it must beat.

    The bars: the majority answer and the base without the document (the 95% interval must lie above both),
    and the base with the document in context. ``predictions``: the lines of predictions.jsonl; where both models
    answered the same examples, their difference is taken in pairs, which makes it surer.
    """
    final = final_row(rows)
    if final is None:
        return "Nothing was trained: these are the base model's figures."
    bare, carried = find_row(rows, "base", False), find_row(rows, "base", True)
    majority = final.get("majority") or 0.0
    floor = max(majority, bare["accuracy"] if bare else 0.0)
    name = "the most frequent answer" if floor == majority else "the base model"
    found = f"{final['accuracy']:.1%} of {final['n']} held-out examples right without the document"
    low = (final.get("accuracy_ci") or [final["accuracy"]])[0]
    if low <= floor:
        return (
            f"**Not internalized:** after {stage_title(final['model'])}, {found}; that is not above {name} "
            f"({floor:.1%}). {_carried_says(carried)}".rstrip()
        )
    done, beside = final["accuracy"] >= GOOD, ""
    if carried is not None:
        gap, (low, high) = final["accuracy"] - carried["accuracy"], _gap_interval(final, carried, predictions)
        level = low <= 0 <= high
        done = done and (gap >= -CLOSE or (level and low >= -UNSEEN))
        how = f"{100 * abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
        if level:
            how = "within the test set's error of"
        beside = f", {how} the base model carrying the document ({carried['accuracy']:.1%})"
    verdict = "Internalized" if done else "Partly internalized"
    return f"**{verdict}:** {found}{beside}; {name} earns {floor:.1%}. {_cost_says(rows)}".rstrip()


def _gap_interval(final: dict, carried: dict, predictions: Sequence[dict]) -> tuple[float, float]:
    """95% interval of the accuracy of ``final`` without the document less that of ``carried`` with it."""
    right = [right_answers(predictions, row["model"], row["document_in_context"]) for row in (final, carried)]
    shares = [(row["accuracy"], row["n"]) for row in (final, carried)]
    reach = Z95 * math.sqrt(difference_variance(*shares, *right))
    gap = shares[0][0] - shares[1][0]
    return gap - reach, gap + reach


def caveats(rows: Sequence[dict], lost: dict | None = None, stages: Sequence[Mapping] = ()) -> list[str]:
    """What a reader should know before trusting the model.

    ``lost``: see :func:`forgetting.forgetting`. ``stages``: the recipe's, as it writes them, so that no advice
    is given that is already followed.
    """
    final = final_row(rows)
    out = []
    if final is None:
        return out
    match = final.get("trace_consistent")
    what = "is true to the document and to itself"
    if match is None:
        match, what = final.get("trace_match"), "equals the reference trace"
    if match is not None and match < TRUSTED_TRACE:
        out.append(
            f"The reasoning {what} in only {match:.0%} of the answers: the answer may be right and the trace "
            f"wrong. {_trace_advice(stages, benchmark=final.get('trace_consistent') is not None)}"
        )
    if final["format_rate"] is not None and final["format_rate"] < 0.95:
        out.append(f"Only {final['format_rate']:.0%} of the answers are well formed.")
    if final.get("finished") is not None and final["finished"] < 0.95:
        out.append(
            f"{1 - final['finished']:.0%} of the answers were cut off; raise "
            "evaluation.max_completion_tokens."
        )
    if final["n"] < 100:
        out.append(f"Only {final['n']} examples were asked; intervals are wide.")
    if lost and lost["rise"] > 0.10:
        out.append(
            f"Perplexity on unrelated text rose by {lost['rise']:.0%}: something else was forgotten. "
            "Train fewer steps, or with a lower learning rate or rank."
        )
    return out


def _trace_advice(stages: Sequence[Mapping], *, benchmark: bool) -> str:
    """What the recipe does not do yet for its traces. Only a benchmark's documents can be checked by ``trace``."""
    reward = "a `trace` reward" if benchmark else "a reward `function` that checks the trace"
    rl = next((s for s in reversed(stages) if s.get("stage") == "rl"), None)
    if rl is None:
        return f"Train sft for longer, or add an rl stage with {reward}."
    kind = "trace" if benchmark else "function"
    rewarded = any(r.get("kind") == kind and r.get("weight", 1.0) > 0 for r in rl.get("rewards") or ())
    missing = [] if rewarded else [reward]
    # not kl_coef: its reference is the base without the document, which takes right words for unlikely ones
    if not rl.get("policy_aware") or rl.get("policy_aware_sampler") != "reference":
        missing.append("PolicyRollout with `policy_aware_sampler: reference`")
    if not rl.get("sft_coef"):
        missing.append("`sft_coef`")
    advice = []
    if missing:
        advice.append(f"add {_either(missing)} to the rl stage")
    if rewarded:
        whose = "its" if missing else "the rl stage's"
        advice.append(f"give {whose} `{kind}` reward more weight")
    advice.append("train it for more steps")
    said = ", or ".join(advice)
    return f"{said[0].upper()}{said[1:]}."


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _carried_says(carried: dict | None) -> str:
    if carried is None:
        return ""
    return f"The base model with the document in context reaches {carried['accuracy']:.1%}."


def _cost_says(rows: Sequence[dict]) -> str:
    cost = prompt_cost(rows)
    if cost is None:
        return ""
    before, after = (r["prompt_tokens"] for r in cost)
    return f"The prompt shrinks from {before:,.0f} to {after:,.0f} tokens ({after / before - 1:+.0%})."
