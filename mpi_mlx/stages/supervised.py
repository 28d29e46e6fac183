"""``cpt`` (visually masked continual pretraining) and ``sft``: labelled rows with and without the document.

TriMPI's first two stages (arXiv 2510.09474, section 3). They differ in whether the document stands in the
system message and in which tokens are trained; batching, loss and loop are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.data.completion import completion_text
from mpi_mlx.data.examples import Example
from mpi_mlx.documents import PolicyDocument, passages, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.training import world
from mpi_mlx.training.batch import MicroBatch, Row, check_length, loss_weights, micro_batch
from mpi_mlx.training.fit import Batch
from mpi_mlx.training.forward import micro_logprobs
from mpi_mlx.training.losses import sft_loss


def encode_example(model, example, document: PolicyDocument | None, stage: str, *, reasoning: bool = True) -> Row:
    """The training row of one example; ``document`` is placed in the system message when given.

    Raises:
        DataError: the example has no answer to learn.
    """
    if example.answer is None:
        raise DataError(f"example {example.id!r} has no answer; stage {stage} needs labelled examples")
    prompt = model.encode(
        place_document(example.messages, document), tools=example.tools, generation_prompt=True
    )
    text = completion_text(example.reasoning if reasoning else None, example.answer)
    encoded = prompt.concat(model.encode_completion(text))
    return Row(encoded, loss_weights(encoded, stage), example.id)


class SupervisedSource:
    """Examples in a new order each epoch; each process takes its rows of the step's batch.

    A step takes ``batch_size * accumulate`` rows a process. Whether a row carries the document is drawn for
    (epoch, example): always in ``cpt``, in ``document_fraction`` of the rows in ``sft``. ``document_questions``
    of cpt's rows ask, without the document, for a section of it.
    """

    def __init__(self, model, examples: Sequence, document: PolicyDocument | None, spec, seed: int):
        if not examples:
            raise DataError(f"stage {spec.stage}: the train split is empty; give it labelled examples")
        self.model, self.examples, self.document = model, examples, document
        self.spec, self.seed = spec, seed
        self.rows_per_process = spec.batch_size * spec.accumulate
        self.per_step = self.rows_per_process * world.world().size()
        self._rows: dict[tuple[int, bool], Row] = {}
        self.questions = _questions(document) if getattr(spec, "document_questions", 0.0) else []

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass

    def batch(self, step: int) -> Batch:
        picked = [self._pick(step * self.per_step + i) for i in range(self.per_step)]
        mine = picked[world.world().rank() :: world.world().size()]
        rows = [self._row(index, carries) for index, carries in mine]
        order = sorted(range(len(rows)), key=lambda i: (mine[i][1], len(rows[i]), i))
        micros: list[MicroBatch] = []
        for carries in (False, True):
            # Rows with the document share its prefix; rows without it share too little to gain by it.
            chosen = [rows[i] for i in order if mine[i][1] == carries]
            for start in range(0, len(chosen), self.spec.batch_size):
                some = chosen[start : start + self.spec.batch_size]
                micros.append(micro_batch(some, self.model.pad_id, packed=True))
        count, tokens = world.sum_numbers(
            [sum(m.count for m in micros), float(sum(len(r) for r in rows))]
        )
        return Batch(micros, count, int(tokens), identities=tuple(r.identity for r in rows))

    def _pick(self, position: int) -> tuple[int, bool]:
        epoch, at = divmod(position, len(self.examples))
        if self.questions:
            chance = np.random.default_rng([self.seed, 23, position])
            if chance.random() < self.spec.document_questions:
                return len(self.examples) + int(chance.integers(len(self.questions))), False
        order = np.random.default_rng([self.seed, 21, epoch]).permutation(len(self.examples))
        fraction = 1.0 if self.spec.stage == "cpt" else self.spec.document_fraction
        if self.document is None:
            fraction = 0.0
        draw = np.random.default_rng([self.seed, 22, epoch]).random(len(self.examples))[at]
        return int(order[at]), bool(draw < fraction)

    def _row(self, index: int, carries: bool) -> Row:
        known = self._rows.get((index, carries))
        if known is None:
            spec = self.spec
            asked = index - len(self.examples)
            known = encode_example(
                self.model, self.examples[index] if asked < 0 else self.questions[asked], self.document if carries else None, spec.stage,
                reasoning=spec.reasoning,
            )
            self._rows[index, carries] = check_length(known, spec.max_tokens)
        return known


def _questions(document: PolicyDocument | None) -> list[Example]:
    """The document's sections as questions and answers."""
    found = passages(document) if document is not None else []
    if not found:
        raise DataError("stage cpt: document_questions needs a document with headings; add some, or set it to 0")
    return [
        Example(f"section {n + 1}", ({"role": "user", "content": question},), None, section)
        for n, (question, section) in enumerate(found)
    ]


class SupervisedObjective:
    """Cross-entropy over the weighted tokens: (sum, metrics)."""

    def __init__(self, model):
        self.model = model

    def __call__(self, micro: MicroBatch) -> tuple[mx.array, dict]:
        logprobs, weights = micro_logprobs(self.model, micro)
        loss, _ = sft_loss(logprobs, weights)
        return loss, {}


def validation_loss(model, examples: Sequence, document: PolicyDocument | None, spec) -> float:
    """Mean loss a trained token over ``examples``, as the stage would train on them."""
    rows = [
        encode_example(model, e, document if spec.stage == "cpt" else None, spec.stage, reasoning=spec.reasoning)
        for e in examples
    ]
    rows.sort(key=len)
    model.net.eval()
    total, count = 0.0, 0.0
    for start in range(0, len(rows), spec.batch_size):
        micro = micro_batch(rows[start : start + spec.batch_size], model.pad_id, packed=True)
        logprobs, weights = micro_logprobs(model, micro)
        loss, number = sft_loss(logprobs, weights)
        total, count = total + loss.item(), count + number.item()
    model.net.train()
    return total / max(count, 1.0)
