"""``cpt`` (visually masked continual pretraining) and ``sft``: labelled rows with and without the document.

TriMPI's first two stages (arXiv 2510.09474, section 3). They differ in whether the document stands in the
system message and in which tokens are trained; batching, loss and loop are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mpi_mlx.data.completion import after_opening, completion_text
from mpi_mlx.data.examples import Example
from mpi_mlx.documents import PolicyDocument, passages, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.models.images import ByteLRU
from mpi_mlx.stages.rehearsal import Rehearsal, RehearsalMicro
from mpi_mlx.stages.survey import Findings, Survey
from mpi_mlx.training import world
from mpi_mlx.training.batch import MicroBatch, Row, check_length, loss_weights, micro_batch
from mpi_mlx.training.fit import Batch
from mpi_mlx.training.forward import encode_images, micro_logprobs
from mpi_mlx.training.losses import sft_loss

ROW_CACHE_BYTES = 512 << 20
NEAR = 64  # tokens by which an estimated length may be wrong: a template's own system prompt may give way
SURE = 8  # so many rows with the document are encoded whole at most, to know the longest


def encode_example(model, example, document: PolicyDocument | None, stage: str, *, reasoning: bool = True) -> Row:
    """The training row of one example; ``document`` is placed in the system message when given.

    Raises:
        DataError: the example has no answer to learn.
    """
    if example.answer is None:
        raise DataError(f"{example.where} has no answer; stage {stage} needs labelled examples")
    prompt = model.encode(
        place_document(example.messages, document), tools=example.tools, generation_prompt=True
    )
    text = completion_text(example.reasoning if reasoning else None, example.answer)
    text = after_opening(text) if model.opens_trace(prompt) else text
    encoded = prompt.concat(model.encode_completion(text))
    return Row(encoded, loss_weights(encoded, stage), example.id)


class SupervisedSource:
    """Examples in a new order each epoch; each process takes its rows of the step's batch.

    A step takes ``batch_size * accumulate`` rows a process. Whether a row carries the document is drawn for
    (epoch, example): always in ``cpt``, in ``document_fraction`` of the rows in ``sft``. ``document_questions``
    of cpt's rows ask, without the document, for a section of it; ``rehearsal`` of all are the base's own texts.
    """

    def __init__(self, model, examples: Sequence, document: PolicyDocument | None, spec, seed: int):
        if not examples and getattr(spec, "rehearsal", 0.0) < 1:
            raise DataError(f"stage {spec.stage}: the train split is empty; give it labelled examples")
        self.model, self.examples, self.document = model, examples, document
        self.spec, self.seed = spec, seed
        self.rows_per_process = spec.batch_size * spec.accumulate
        self.per_step = self.rows_per_process * world.world().size()
        self._rows: ByteLRU[Row] = ByteLRU(ROW_CACHE_BYTES)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self.questions = _questions(document) if getattr(spec, "document_questions", 0.0) else []
        self.rehearsal, self.rehearsed_share = Rehearsal(model, seed), getattr(spec, "rehearsal", 0.0)

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass

    def batch(self, step: int) -> Batch:
        picked = [self._pick(step * self.per_step + i) for i in range(self.per_step)]
        mine = picked[world.world().rank() :: world.world().size()]
        rehearsed = [index - self._labelled for index, _ in mine if index >= self._labelled]
        mine = [(index, carries) for index, carries in mine if index < self._labelled]
        rows = [self._row(index, carries) for index, carries in mine]
        order = sorted(range(len(rows)), key=lambda i: (mine[i][1], len(rows[i]), i))
        micros: list[MicroBatch | RehearsalMicro] = []
        for carries in (False, True):
            # Rows with the document share its prefix; rows without it share too little to gain by it.
            chosen = [rows[i] for i in order if mine[i][1] == carries]
            for start in range(0, len(chosen), self.spec.batch_size):
                some = chosen[start : start + self.spec.batch_size]
                micros.append(micro_batch(some, self.model.pad_id, packed=True))
        for start in range(0, len(rehearsed), self.spec.batch_size):
            micros.append(self.rehearsal.micro(rehearsed[start : start + self.spec.batch_size]))
        rows += [self.rehearsal.row(index) for index in rehearsed]
        count, tokens = world.sum_numbers(
            [sum(m.count for m in micros), float(sum(len(r) for r in rows))]
        )
        return Batch(micros, count, int(tokens), identities=tuple(r.identity for r in rows))

    def _pick(self, position: int) -> tuple[int, bool]:
        if self.rehearsed_share:
            chance = np.random.default_rng([self.seed, 24, position])
            if chance.random() < self.rehearsed_share:
                return self._labelled + int(chance.integers(len(self.rehearsal))), False
        if self.questions:
            chance = np.random.default_rng([self.seed, 23, position])
            if chance.random() < self.spec.document_questions:
                return len(self.examples) + int(chance.integers(len(self.questions))), False
        epoch, at = divmod(position, len(self.examples))
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng([self.seed, 21, epoch]).permutation(len(self.examples))
            draws = np.random.default_rng([self.seed, 22, epoch]).random(len(self.examples))
            self._epoch = epoch, order, draws
        _, order, draws = self._epoch
        return int(order[at]), bool(draws[at] < self._document_share)

    @property
    def _labelled(self) -> int:
        """Examples and questions; indices from here on are texts to rehearse."""
        return len(self.examples) + len(self.questions)

    @property
    def _document_share(self) -> float:
        if self.document is None:
            return 0.0
        return 1.0 if self.spec.stage == "cpt" else self.spec.document_fraction

    def _row(self, index: int, carries: bool) -> Row:
        return check_length(self._encoded(index, carries), self.spec.max_tokens)

    def _example(self, index: int) -> Example:
        asked = index - len(self.examples)
        return self.examples[index] if asked < 0 else self.questions[asked]

    def _encoded(self, index: int, carries: bool) -> Row:
        row = self._rows.get((index, carries))
        if row is None:
            document, spec = self.document if carries else None, self.spec
            row = encode_example(self.model, self._example(index), document, spec.stage, reasoning=spec.reasoning)
            arrays = (row.weights, row.encoded.ids, row.encoded.position_ids, row.encoded.visual, row.encoded.assistant)
            self._rows.put((index, carries), row, 1024 + sum(a.nbytes for a in arrays))
        return row

    # ---- looking ahead

    def survey(self, steps: int) -> Survey:
        """Looks at every row of the first ``steps`` steps; the processes share the work.

        Rows are encoded without the document, which is encoded once: a long one in each row would take minutes.
        Where that leaves a doubt the whole row is.

        Raises:
            DataError: rows over ``max_tokens``, without an answer, or that the model cannot read; all of them.
        """
        limit = self.spec.max_tokens
        findings = Findings(self.spec.stage)
        exact: set[tuple[int, bool]] = set()

        def whole(row: tuple[int, bool]) -> int:
            exact.add(row)
            return len(self._encoded(*row))

        def look(row: tuple[int, bool]) -> int:
            bare = len(self._encoded(row[0], False))
            if not row[1]:
                return whole(row)
            if not findings.document:
                findings.document = whole(row) - bare
            carried = bare + findings.document
            near = limit is not None and abs(carried - limit) <= NEAR
            return whole(row) if near else carried

        for row in world.share(self._drawn(steps)):
            findings.measure(row, self._example(row[0]), lambda row=row: look(row))
        for _ in range(SURE if findings.lengths else 0):
            longest = max(findings.lengths, key=findings.lengths.get)
            if longest in exact:
                break
            findings.measure(longest, self._example(longest[0]), lambda row=longest: whole(row))
        return findings.conclude(limit)

    def _drawn(self, steps: int) -> list[tuple[int, bool]]:
        """The distinct (index, carries) of the first ``steps`` steps, of all processes; no texts to rehearse."""
        forms = 2 if 0 < self._document_share < 1 else 1
        most, seen = len(self.examples) * forms + len(self.questions), {}
        for position in range(steps * self.per_step):
            picked = self._pick(position)
            if picked[0] < self._labelled:
                seen[picked] = None
            if len(seen) == most:
                break
        return list(seen)


def _questions(document: PolicyDocument | None) -> list[Example]:
    """The document's sections as questions and answers."""
    found = passages(document) if document is not None else []
    if not found:
        raise DataError(
            "stage cpt: document_questions needs a document with headings, and sections that show no image; "
            "add some, or set it to 0"
        )
    return [
        Example(f"section {n + 1}", ({"role": "user", "content": question},), None, section)
        for n, (question, section) in enumerate(found)
    ]


class SupervisedObjective:
    """Cross-entropy over the weighted tokens, or what texts to rehearse lose: (sum, metrics)."""

    def __init__(self, model):
        self.model = model

    def prepare(self, micro: MicroBatch | RehearsalMicro) -> None:
        if not isinstance(micro, RehearsalMicro):
            encode_images(self.model, micro)

    def __call__(self, micro: MicroBatch | RehearsalMicro) -> tuple[mx.array, dict]:
        if isinstance(micro, RehearsalMicro):
            return micro.loss(self.model), {}
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
