"""The reference's completions, drawn for several steps at once.

The reference (adapters switched off) is the same model at every step, so what it will say can be drawn at any
time before. A larger batch decodes more tokens a second: on a CPU, 256 rows of the embedded model take three times
as long as 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpi_mlx.rollouts.sampler import Completion

MOST_ROWS = 256  # decoded together
MOST_BYTES = 256 * 2**20  # of their keys and values

Draw = Callable[[list[int]], list[list[Completion]]]


class Ahead:
    """Completions by a prompt's position, drawn in blocks of whole steps.

    The blocks' borders depend on the settings alone, not on where a run begins, so a continued run draws the same
    batches, and with them the same bits.

    Args:
        draw: positions -> one list of completions a position.
        per_step: positions that a step takes, of all processes.
        steps: steps of a block.
        last: steps that there are in all; None when refilling may take more.
    """

    def __init__(self, draw: Draw, per_step: int, steps: int, last: int | None):
        self.draw, self.per_step, self.steps, self.last = draw, per_step, max(1, steps), last
        self._found: dict[int, list[Completion]] = {}

    def __call__(self, positions: Sequence[int], cursor: int) -> list[list[Completion]]:
        """Completions of a step's ``positions``, of which ``cursor`` is the first over all processes."""
        if positions[0] not in self._found:
            block = cursor // self.per_step // self.steps
            stop = (block + 1) * self.steps
            stop = stop if self.last is None else min(stop, max(self.last, block * self.steps + 1))
            shift = [p - cursor for p in positions]
            mine = [s * self.per_step + i for s in range(block * self.steps, stop) for i in shift]
            self._found = dict(zip(mine, self.draw(mine), strict=True))
        return [self._found[p] for p in positions]


def steps_ahead(model, rows: int, tokens: int) -> int:
    """Steps whose rows, ``rows`` each of up to ``tokens`` tokens, are worth decoding together."""
    text = model.config.get("text_config") or model.config
    heads = text.get("num_attention_heads", 1)
    share = text.get("num_key_value_heads", heads) / heads
    row = 2 * model.num_layers * model.hidden_size * share * model.dtype.size * tokens
    return int(max(1, min(MOST_ROWS // rows, MOST_BYTES // (rows * row))))
