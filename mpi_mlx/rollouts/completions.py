"""What sampling gives: completions, and what they took."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    `ids` int32 (T,), the end-of-turn token included when it was drawn; `logprobs` float32 (T,), each token's
    log-probability under softmax(logits / temperature) over the whole vocabulary (temperature 1 when greedy):
    neither the exclusion of visual tokens nor `top_p` is in it, so that it equals what `training.score`
    computes. `finished`: a stop token was drawn.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    finished: bool


@dataclass
class SamplingStats:
    """What sampling took. `decode_tokens` are kept tokens, `row_steps` slots of the batch x steps."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    row_steps: int = 0


class Collected:
    """What was drawn for each of R rows."""

    def __init__(self, rows: int, max_tokens: int, stops: np.ndarray):
        self.ids = np.zeros((rows, max_tokens), np.int32)
        self.logprobs = np.zeros((rows, max_tokens), np.float32)
        self.lengths = np.zeros(rows, np.int64)
        self.finished = np.zeros(rows, bool)
        self.max_tokens, self.stops = max_tokens, stops
        self._lazy: list[tuple[np.ndarray, int, mx.array]] = []

    def add(self, slots: np.ndarray, step: int, tokens: mx.array, logprobs: mx.array) -> np.ndarray:
        """Record a step's tokens; returns which slots (B,) go on."""
        drawn = np.array(tokens)
        live = np.flatnonzero(slots >= 0)
        live = live[~self.finished[slots[live]]]
        rows = slots[live]
        self.ids[rows, step] = drawn[live]
        self.lengths[rows] = step + 1
        self.finished[rows] = np.isin(drawn[live], self.stops)
        self._lazy.append((slots, step, logprobs))
        going = np.zeros(len(slots), bool)
        going[live] = ~self.finished[rows]
        return going

    def flush(self) -> None:
        for slots, step, logprobs in self._lazy:
            live = slots >= 0
            self.logprobs[slots[live], step] = np.array(logprobs)[live]
        self._lazy.clear()

    def completions(self) -> list[Completion]:
        rows = zip(self.ids, self.logprobs, self.lengths, self.finished, strict=True)
        return [Completion(i[:n].copy(), p[:n].copy(), bool(f)) for i, p, n, f in rows]
