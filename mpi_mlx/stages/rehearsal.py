"""Text of the base model's own, trained on beside the stage's rows so that what it knew is not forgotten.

Rehearsal needs old data, which a model's users do not have. The model can write it (self-synthesized rehearsal,
arXiv 2403.01244): here the texts begin with a word drawn from the vocabulary and follow no instruction, and the base
is the model with its adapters switched off. What is trained is not the texts, a few of which would soon be known by
heart, but the base's whole next-token distribution at each of their places (learning without forgetting,
arXiv 1606.09282): a place's loss is the KL divergence of the model in training from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mpi_mlx.errors import DataError
from mpi_mlx.models.encoding import Encoded
from mpi_mlx.recipe_stages import REHEARSAL_TOKENS
from mpi_mlx.rollouts.sampler import sample_mixed
from mpi_mlx.training.batch import MicroBatch, Row, loss_weights, micro_batch
from mpi_mlx.training.distillation import kl_from
from mpi_mlx.training.forward import hidden_states

TEXTS = 64  # a stage
WORD_TOKENS = 8  # of a first word, at most, with what the tokenizer puts before it


@dataclass(frozen=True)
class RehearsalMicro:
    """Texts to rehearse as one forward, with the base's final hidden states (N, D) at the N places that count."""

    batch: MicroBatch
    teacher: mx.array

    @property
    def count(self) -> float:
        return self.batch.count

    def loss(self, model) -> mx.array:
        """Summed KL divergence of ``model`` from its base."""

        def base_head(hidden: mx.array) -> mx.array:
            with model.adapters_disabled():
                return model.head(hidden)

        return kl_from(model.loss_head(), self.teacher, _at_weights(model, self.batch), teacher_head=base_head).sum()


class Rehearsal:
    """A stage's texts, as training rows. Written when the first is asked for; the same in every process."""

    def __init__(self, model, seed: int):
        self.model, self.seed = model, seed
        self._rows: list[Row] = []
        self._teachers: dict[int, mx.array] = {}

    def __len__(self) -> int:
        return TEXTS

    def row(self, index: int) -> Row:
        """Text ``index``; its first word is context, what the base wrote after it is trained."""
        if not self._rows:
            self._rows = self._write()
        return self._rows[index]

    def micro(self, indices: Sequence[int]) -> RehearsalMicro:
        """These texts, one row each."""
        for index in indices:
            if index not in self._teachers:
                self._teachers[index] = self._teacher(index)
        # never split at a prefix: what repeats here is a whole text
        batch = micro_batch([self.row(i) for i in indices], self.model.pad_id, min_prefix=REHEARSAL_TOKENS)
        return RehearsalMicro(batch, mx.concatenate([self._teachers[i] for i in indices]))

    def _teacher(self, index: int) -> mx.array:
        """The base's hidden states (n, D) where text ``index`` is trained. Alone, so that nothing else matters."""
        alone = micro_batch([self.row(index)], self.model.pad_id)
        with _as_base(self.model):
            states = mx.stop_gradient(_at_weights(self.model, alone))
            mx.eval(states)
        return states

    def _write(self) -> list[Row]:
        model = self.model
        random = np.random.default_rng([self.seed, 25])
        words = random.choice(np.array(first_words(model.tokenizer), dtype=object), TEXTS)
        prompts = [_prompt(model, word) for word in words]
        with _as_base(model):
            key = mx.random.key(int(random.integers(2**31)))
            found = sample_mixed(model, [(p, 1) for p in prompts], max_tokens=REHEARSAL_TOKENS - WORD_TOKENS, key=key)
        texts = [p.concat(some[0].ids) for p, some in zip(prompts, found, strict=True)]
        return [Row(text, loss_weights(text, "sft"), f"rehearsal {n}") for n, text in enumerate(texts)]


@contextmanager
def _as_base(model) -> Iterator[None]:
    """Within, adapters are off and nothing is dropped out."""
    was_training = model.net.training
    model.net.eval()
    try:
        with model.adapters_disabled():
            yield
    finally:
        model.net.train(was_training)


def _at_weights(model, batch: MicroBatch) -> mx.array:
    """Final hidden states (N, D) at the N positions that have a weight, row after row."""
    _, hidden = hidden_states(model, batch)
    places = np.flatnonzero(batch.tails.weights.reshape(-1)).astype(np.int32)
    return hidden.reshape(-1, hidden.shape[-1])[mx.array(places)]


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
