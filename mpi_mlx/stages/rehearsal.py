"""Text of the base model's own, trained on beside the stage's rows so that what it knew is not forgotten.

Rehearsal needs old data, which a model's users do not have. The model can write it: a language model's samples are
drawn from what it learned, and cross-entropy on them is, up to a constant, the KL divergence of the model in training
from the base. Self-synthesized rehearsal: arXiv 2403.01244. Here the texts begin with a word drawn from the
vocabulary and follow no instruction; the base is the model with its adapters switched off.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mpi_mlx.errors import DataError
from mpi_mlx.models.encoding import Encoded
from mpi_mlx.recipe_stages import REHEARSAL_TOKENS
from mpi_mlx.rollouts.sampler import sample_mixed
from mpi_mlx.training.batch import Row, loss_weights

TEXTS = 64  # a stage
WORD_TOKENS = 8  # of a first word, at most, with what the tokenizer puts before it


class Rehearsal:
    """A stage's texts, as training rows. Written when the first is asked for; the same in every process."""

    def __init__(self, model, seed: int):
        self.model, self.seed = model, seed
        self._rows: list[Row] = []

    def __len__(self) -> int:
        return TEXTS

    def row(self, index: int) -> Row:
        """Text ``index``; its first word is context, what the base wrote after it is trained."""
        if not self._rows:
            self._rows = self._write()
        return self._rows[index]

    def _write(self) -> list[Row]:
        model = self.model
        random = np.random.default_rng([self.seed, 25])
        words = random.choice(np.array(first_words(model.tokenizer), dtype=object), TEXTS)
        prompts = [_prompt(model, word) for word in words]
        was_training = model.net.training
        model.net.eval()  # no dropout
        with model.adapters_disabled():
            key = mx.random.key(int(random.integers(2**31)))
            found = sample_mixed(model, [(p, 1) for p in prompts], max_tokens=REHEARSAL_TOKENS - WORD_TOKENS, key=key)
        model.net.train(was_training)
        texts = [p.concat(some[0].ids) for p, some in zip(prompts, found, strict=True)]
        return [Row(text, loss_weights(text, "sft"), f"rehearsal {n}") for n, text in enumerate(texts)]


def first_words(tokenizer) -> list[str]:
    """Tokens that are a capitalised word of three letters or more, as text; all that are words where none is.

    Raises:
        DataError: no token is a word in Latin letters.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    words = sorted({piece.lstrip("Ġ▁ ") for piece in pieces if piece})
    words = [w for w in words if w.isascii() and w.isalpha()]
    if not words:
        raise DataError("rehearsal: no token of this model is a word in Latin letters to begin a text; set it to 0")
    return [w for w in words if len(w) >= 3 and w.istitle()] or words


def _prompt(model, word: str) -> Encoded:
    """A text that begins with ``word``, after what the tokenizer puts before any text."""
    ids = np.array(model.tokenizer(word)["input_ids"], np.int32)[:WORD_TOKENS]
    if len(ids) > 1 and int(ids[-1]) in model.eos_ids:
        ids = ids[:-1]
    nothing = np.zeros(len(ids), bool)
    axes = 3 if model.uses_mrope else 1
    positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (axes, len(ids)))
    return Encoded(ids, nothing, nothing, (), positions)
