"""One model, one set of examples, with or without the document in context: a row and its predictions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np

from mpi_mlx.data.completion import split_completion
from mpi_mlx.data.examples import Example
from mpi_mlx.data.policy_tree import tree_of
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.evaluation.metrics import majority_share, same_text, share, wilson_interval
from mpi_mlx.models.context import check_context, context_length
from mpi_mlx.models.encoding import content_text
from mpi_mlx.rollouts.prefill import prefill
from mpi_mlx.rollouts.rewards import exact_match, trace, well_formed
from mpi_mlx.rollouts.sampler import Completion, SamplingStats, finish, greedy_batches
from mpi_mlx.rollouts.tool_calls import parse_tool_calls, tool_call_score
from mpi_mlx.training import world

PREFILL_PROMPTS = 5  # prompts whose prefill is timed alone
Progress = Callable[[int, int], None]  # (examples answered, examples in all): 0 first, then after each batch


@dataclass(frozen=True)
class Prediction:
    """A line of predictions.jsonl. ``trace_match`` is None where the example has no trace."""

    id: str
    model: str
    document_in_context: bool
    completion: str
    answer: str
    expected: str
    correct: bool
    trace_match: bool | None
    finished: bool


def evaluate(
    model,
    examples: Sequence[Example],
    document: PolicyDocument | None = None,
    *,
    label: str,
    spec,
    reasoning: bool = True,
    progress: Progress | None = None,
) -> tuple[dict, list[dict]]:
    """Greedy answers to ``examples``, graded.

    Args:
        document: placed in context when given; None is the model on its own.
        label: names the model in the row: ``base``, ``cpt``, ``sft``, ``rl`` ...
        spec: the recipe's ``evaluation``: ``batch_size``, ``max_completion_tokens``, ``samples``.
        reasoning: whether completions should hold a trace (for the format rate).

    Returns:
        (row, predictions): the row of results.json (see ``_row``) and the lines of predictions.jsonl.

    Raises:
        DataError: no examples, one without an answer, or one that is too long for the model.
    """
    work = evaluation(model, examples, document, label=label, spec=spec, reasoning=reasoning)
    while True:
        try:
            done = next(work)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(*done)


def evaluation(
    model,
    examples: Sequence[Example],
    document: PolicyDocument | None = None,
    *,
    label: str,
    spec,
    reasoning: bool = True,
) -> Generator[tuple[int, int], None, tuple[dict, list[dict]]]:
    """:func:`evaluate` in steps: yields (examples answered, examples in all), 0 first, then after each batch.

    May be left at any of them; the processes of a data-parallel run must leave at the same one, and each
    yields as often as the others.
    """
    examples = list(examples)[: getattr(spec, "samples", None)]
    if not examples:
        raise DataError("evaluation: the test split is empty; give it examples with answers")
    for example in examples:
        if example.answer is None:
            raise DataError(f"evaluation: example {example.id!r} has no answer to compare with")
    yield 0, len(examples)
    prompts = [
        model.encode(place_document(e.messages, document), tools=e.tools, generation_prompt=True)
        for e in examples
    ]
    _check_longest(model, examples, [len(p.ids) for p in prompts], document, spec)
    began = time.perf_counter()
    stats = SamplingStats()
    completions = yield from _generate(model, prompts, spec, stats)
    seconds = time.perf_counter() - began
    predictions = [
        _grade(e, model.turn_text(p, c.ids), c.finished, label, document is not None)
        for e, p, c in zip(examples, prompts, completions, strict=True)
    ]
    row = _row(examples, predictions, label, document is not None, reasoning)
    row |= {
        "prompt_tokens": statistics.fmean(len(p.ids) for p in prompts),
        "completion_tokens": statistics.fmean(len(c.ids) for c in completions),
        "prefill_seconds": time_prefill(model, prompts),
        "seconds": seconds,
        "decode_tokens_per_second": stats.decode_tokens / max(stats.decode_seconds, 1e-9),
    }
    return row, [asdict(p) for p in predictions]


def check_evaluation(model, examples: Sequence[Example], document: PolicyDocument | None, spec) -> None:
    """Whether the model takes the example with the longest text, with the document in context, and an answer: a
    document that is too long must not end a run after its training. :func:`evaluation` looks at every example.

    Raises:
        DataError: it does not.
    """
    examples = list(examples)[: getattr(spec, "samples", None)]
    if not examples or document is None or not getattr(spec, "with_document", True):
        return
    longest = max(examples, key=lambda e: sum(len(content_text(m.get("content"))) for m in e.messages))
    prompt = model.encode(place_document(longest.messages, document), tools=longest.tools, generation_prompt=True)
    _check_longest(model, [longest], [len(prompt)], document, spec)


def _check_longest(
    model, examples: Sequence[Example], lengths: Sequence[int], document: PolicyDocument | None, spec
) -> None:
    """Whether the longest prompt and its answer fit. Raises DataError."""
    tokens, example = max(zip(lengths, examples, strict=True), key=lambda pair: pair[0])
    limit = context_length(model)
    if limit is None or tokens + spec.max_completion_tokens <= limit:
        return
    mode, advice, added = "without the document", "shorten the example", 0
    if document is not None:
        mode, advice = "with the document in context", "shorten the document, set evaluation.with_document: false"
        added = tokens - len(model.encode(example.messages, tools=example.tools, generation_prompt=True))
    check_context(
        model, tokens + spec.max_completion_tokens, f"evaluation {mode}: {example.where}", document=added,
        completion=spec.max_completion_tokens, advice=f"{advice}, lower evaluation.max_completion_tokens",
    )


def time_prefill(model, prompts: Sequence, count: int = PREFILL_PROMPTS) -> float:
    """Seconds to prefill one prompt, alone and whole: median over a few, spread over ``prompts``.

    Image features are taken from the cache, so this is the language model's part, which is what the
    document costs in every query. One untimed forward warms up.
    """
    step = max(1, len(prompts) // count)
    chosen = prompts[::step][:count]
    times = []
    for prompt in [chosen[0], *chosen]:
        began = time.perf_counter()
        mx.eval(model.head(prefill(model, [prompt]).hidden))
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _generate(model, prompts, spec, stats: SamplingStats) -> Generator[tuple[int, int], None, list[Completion]]:
    """Greedy completions of all prompts; each process of a data-parallel run answers its share."""
    processes, total = world.world().size(), len(prompts)
    mine = world.share(list(prompts))
    work = greedy_batches(
        model, mine, max_tokens=spec.max_completion_tokens, batch_size=spec.batch_size, stats=stats
    )
    # A process whose share is one shorter may be done a batch sooner; it still says so as often as the rest.
    for batch in range(1, -(-total // (processes * spec.batch_size)) + 1):
        if len(mine) > (batch - 1) * spec.batch_size:
            next(work)
        yield min(batch * spec.batch_size * processes, total), total
    found = finish(work)
    if processes == 1:
        return found
    numbers = world.share(list(range(total)))
    told = [[n, c.ids.tolist(), c.finished] for n, c in zip(numbers, found, strict=True)]
    return [
        Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), finished)
        for _, ids, finished in sorted(world.gather_objects(told))
    ]


def _grade(example: Example, text: str, finished: bool, label: str, in_context: bool) -> Prediction:
    reasoning, answer = split_completion(text)
    matches = None
    if example.reasoning is not None:
        matches = same_text(reasoning or "", example.reasoning)
    return Prediction(
        id=example.id, model=label, document_in_context=in_context, completion=text, answer=answer,
        expected=example.answer, correct=exact_match(text, example) == 1.0, trace_match=matches,
        finished=finished,
    )


def _row(
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    label: str,
    in_context: bool,
    reasoning: bool,
) -> dict:
    """The graded part of a row.

    ``trace_match``: share of traces equal to the reference trace, blanks aside; null without reference traces
    or where none is wanted. ``trace_consistent``: share of traces that are true to the document and to
    themselves (benchmark only). ``majority``: what the most frequent expected answer would earn.
    """
    n, right = len(predictions), sum(p.correct for p in predictions)
    matches = [p.trace_match for p in predictions if p.trace_match is not None] if reasoning else []
    consistent = [
        trace(p.completion, e) == 1.0
        for e, p in zip(examples, predictions, strict=True)
        if reasoning and tree_of(e.meta) is not None
    ]
    row = {
        "model": label,
        "document_in_context": in_context,
        "accuracy": right / n,
        "accuracy_ci": list(wilson_interval(right, n)),
        "format_rate": share(well_formed(p.completion, reasoning=reasoning) for p in predictions),
        "trace_match": share(matches),
        "trace_consistent": share(consistent),
        "n": n,
        "majority": majority_share(p.expected for p in predictions),
        "finished": share(p.finished for p in predictions),
    }
    calls = [p for p in predictions if parse_tool_calls(p.expected)]
    if calls:
        row["tool_call_score"] = statistics.fmean(tool_call_score(p.answer, p.expected) for p in calls)
    return row
