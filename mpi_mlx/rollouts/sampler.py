"""Sampling: every completion of a step decoded as one batch.

What prompts share (a document) is prefilled once, each prompt's rest once, what a prompt's completions begin
with in common once, and all advance together; rows that have ended are dropped and the batch compacted. The
tokens a key gives do not depend on that: each row has its own uniform numbers, one a token, turned into a token
by inverting the distribution.
"""

import time
from collections.abc import Collection, Generator, Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.models import kv
from mpi_mlx.models.merged import merged_adapters
from mpi_mlx.models.pieces import Cluster, cluster_prompts
from mpi_mlx.rollouts.completions import Collected, Completion, SamplingStats
from mpi_mlx.rollouts.decode import Batch
from mpi_mlx.rollouts.draw import Draw
from mpi_mlx.rollouts.prefill import prefill, prefill_shared


def sample(
    model, prompts: Sequence, *, num_samples: int = 1, max_tokens: int, temperature: float = 1.0, **options
) -> list[list[Completion]]:
    """`num_samples` completions of each of P prompts (`Encoded`): P lists. Options as in `sample_mixed`."""
    requests = [(prompt, num_samples) for prompt in prompts]
    return sample_mixed(model, requests, max_tokens=max_tokens, temperature=temperature, **options)


def sample_mixed(
    model,
    requests: Sequence[tuple[object, int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    key: mx.array | None = None,
    stop_ids: Collection[int] | None = None,
    max_rows: int | None = None,
    logprobs: bool = True,
    stats: SamplingStats | None = None,
) -> list[list[Completion]]:
    """Completions for (prompt, how many) requests, decoded as one batch: one list a request, in order.

    Prompts with and without a document may be mixed: those that carry it share its prefill.

    Args:
        max_tokens: longest completion.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the smallest set of tokens that holds this probability.
        key: MLX random key, or one a request (len(requests), 2), which makes a request's tokens independent
            of the others; needed unless temperature is 0.
        stop_ids: tokens that end a completion and stay in it; the model's `eos_ids` by default. Empty: none.
        max_rows: decode in waves of at most so many rows.
        logprobs: False leaves `Completion.logprobs` zero and spares a softmax when greedy.
        stats: counted up.
    """
    options = dict(temperature=temperature, top_p=top_p, key=key, stop_ids=stop_ids, max_rows=max_rows)
    return finish(_sample_waves(model, requests, max_tokens, **options, logprobs=logprobs, stats=stats))


def finish(work: Generator):
    """Runs a generator to its end; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def _sample_waves(
    model, requests, max_tokens: int, *, temperature, top_p, key, stop_ids, max_rows, logprobs, stats
) -> Generator[int, None, list[list[Completion]]]:
    """`sample_mixed`, yielding after each wave how many rows are done."""
    kv.route_attention(model.net)
    stats = SamplingStats() if stats is None else stats
    requests = list(requests)
    rows = sum(n for _, n in requests)
    if key is None and temperature > 0:
        raise ValueError("sampling at a temperature needs a random key")
    uniforms = None
    if temperature > 0:
        uniforms = _uniforms(key, [n for _, n in requests], max_tokens)
    draw = Draw(model, temperature, top_p, logprobs)
    stops = np.array(sorted(model.eos_ids if stop_ids is None else stop_ids), np.int32)
    collected = Collected(rows, max_tokens, stops)
    first = np.cumsum([0, *(n for _, n in requests)])
    clusters = cluster_prompts([p for p, _ in requests])
    begin = time.perf_counter()
    shared = [prefill_shared(model, requests[c.indices[0]][0], c.shared) for c in clusters]
    stats.prefill_seconds += time.perf_counter() - begin
    stats.prefill_tokens += sum(c.shared for c in clusters)
    rows_done = 0
    for wave in _waves(clusters, requests, max_rows):
        _run_wave(model, requests, first, wave, shared, draw, uniforms, collected, stats)
        rows_done += sum(requests[i][1] for _, indices in wave for i in indices)
        yield rows_done
    done = collected.completions()
    stats.decode_tokens += sum(len(c.ids) for c in done)
    return [done[first[i] : first[i + 1]] for i in range(len(requests))]


def _uniforms(key: mx.array, counts: Sequence[int], max_tokens: int) -> np.ndarray:
    """(rows, max_tokens) in [0, 1)."""
    if key.ndim == 1:
        return np.array(mx.random.uniform(shape=(sum(counts), max_tokens), key=key))
    drawn = [mx.random.uniform(shape=(n, max_tokens), key=k) for n, k in zip(counts, key, strict=True)]
    return np.concatenate([np.array(d) for d in drawn])


def generate_greedy(model, prompts: Sequence, **options) -> list[Completion]:
    """The greedy completion of each prompt, without log-probabilities. Options as in `greedy_batches`."""
    return finish(greedy_batches(model, prompts, **options))


def greedy_batches(
    model,
    prompts: Sequence,
    *,
    max_tokens: int,
    batch_size: int = 64,
    stop_ids: Collection[int] | None = None,
    stats: SamplingStats | None = None,
) -> Generator[int, None, list[Completion]]:
    """`generate_greedy`, yielding after each batch how many prompts have been answered.

    A shared document is prefilled once for all batches. Batches hold `batch_size` rows, the last one what is left.
    """
    groups = yield from _sample_waves(
        model, [(prompt, 1) for prompt in prompts], max_tokens, temperature=0.0, top_p=1.0, key=None,
        stop_ids=stop_ids, max_rows=batch_size, logprobs=False, stats=stats,
    )
    return [group[0] for group in groups]


def _waves(clusters: Sequence[Cluster], requests, max_rows: int | None) -> list[list[tuple[int, list[int]]]]:
    """Lists of (cluster number, request numbers) of at most `max_rows` rows; within, by length."""
    wave, waves, used = [], [], 0
    for number, cluster in enumerate(clusters):
        indices = [i for i in cluster.indices if requests[i][1] > 0]
        if max_rows is not None:
            indices.sort(key=lambda i: len(requests[i][0]))
        for i in indices:
            if wave and max_rows is not None and used + requests[i][1] > max_rows:
                waves.append(wave)
                wave, used = [], 0
            if not wave or wave[-1][0] != number:
                wave.append((number, []))
            wave[-1][1].append(i)
            used += requests[i][1]
    return [*waves, wave] if wave else waves


def _run_wave(model, requests, first, wave, shared, draw, uniforms, collected, stats) -> None:
    begin = time.perf_counter()
    counted = [i for _, indices in wave for i in indices]
    tokens = sum(len(requests[i][0]) + requests[i][1] * collected.max_tokens for i in counted)
    with merged_adapters(model, tokens):
        batch = _prefilled(model, requests, first, wave, shared, collected, stats)
        middle = time.perf_counter()
        stats.prefill_seconds += middle - begin
        batch.decode(draw, uniforms, collected, stats)
    stats.decode_seconds += time.perf_counter() - middle


def _prefilled(model, requests, first, wave, shared, collected, stats) -> Batch:
    """A wave's prompts, their keys and values stored."""
    blocks, rows, hidden, positions = [], [], [], []
    for number, indices in wave:
        prompts = [requests[i][0] for i in indices]
        ready = prefill(model, prompts, shared[number])
        blocks.append(kv.Block(len(prompts), ready.prefixes))
        rows += [np.arange(first[i], first[i + 1]) for i in indices]
        hidden.append(ready.hidden)
        positions += [p.next_position for p in prompts]
        stats.prefill_tokens += int(ready.prefixes[-1].lengths.sum())
    return Batch(model, blocks, rows, mx.concatenate(hidden), np.array(positions, np.int32))
