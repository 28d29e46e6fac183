"""What internalizing a document costs elsewhere: perplexity on text that has nothing to do with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import resources

import mlx.core as mx
import numpy as np

from mpi_mlx.training.losses import token_logprobs

WINDOW = 512  # tokens a forward
KNOWS_NOTHING = 2000.0  # language models stand far below this, models that never read prose far above


@cache
def general_text() -> str:
    """About 5 KB of plain English prose on everyday matters, written for this project."""
    return (resources.files("mpi_mlx.evaluation") / "general_text.txt").read_text(encoding="utf-8")


def perplexity(model, text: str | None = None, *, window: int = WINDOW) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in windows that do not overlap.

    The text is scored as it is, outside of any chat. The first token of a window has no context and is not
    counted. Compare only models of one tokenizer.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    text = general_text() if text is None else text
    ids = np.asarray(model.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        piece = ids[start : start + window]
        if len(piece) < 2:
            continue
        total -= _log_likelihood(model, piece)
        count += len(piece) - 1
    if not count:
        raise ValueError("perplexity needs at least two tokens")
    return math.exp(total / count)


def _log_likelihood(model, ids: np.ndarray) -> float:
    """Summed log-probability of ids[1:] given what precedes each; ids int32 (T,)."""
    positions = np.arange(len(ids) - 1, dtype=np.int32)[None]
    if model.uses_mrope:
        positions = np.broadcast_to(positions, (3, *positions.shape))
    hidden = model.hidden(model.embed(ids[None, :-1]), mx.array(positions))[0]
    return token_logprobs(model.loss_head(), hidden, mx.array(ids[1:]), gradient=False).sum().item()


def forgetting(perplexities: Mapping[str, float]) -> dict[str, float] | None:
    """``{"base": 20.1, "sft": 20.4, ...}`` -> before, after the last stage, and the rise (0.1: 10% higher).

    None without both figures, and where the base itself knows nothing of such text (the embedded model): it
    has nothing of it to forget.
    """
    trained = [value for label, value in perplexities.items() if label != "base"]
    before = perplexities.get("base")
    if before is None or not trained or before > KNOWS_NOTHING:
        return None
    return {"perplexity_before": before, "perplexity_after": trained[-1], "rise": trained[-1] / before - 1.0}
