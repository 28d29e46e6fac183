"""Shared prefixes against whole rows, computed one by one from the logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mpi_mlx.training.batch import Row, by_length, common_prefix, loss_weights, micro_batch
from mpi_mlx.training.forward import micro_logprobs
from mpi_mlx.training.losses import sft_loss

RULES = "If the sphere is red then answer yes. Otherwise say the colour of the largest cube. " * 2
OTHER = "Refuse when there are two cubes; count the rest, and say how many are blue or green. " * 3


def picture(seed, width=56, height=56):
    return {"type": "image", "image": Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )}  # fmt: skip


def make(model, document, query, answer, *images, stage="cpt", in_document=()):
    system = (
        [{"role": "system", "content": [*in_document, {"type": "text", "text": document}]}]
        if document
        else []
    )
    content = [*images, {"type": "text", "text": query}]
    prompt = model.encode([*system, {"role": "user", "content": content}], generation_prompt=True)
    whole = prompt.concat(model.encode_completion(answer))
    return Row(whole, loss_weights(whole, stage), query)


def one_document(model, stage="cpt"):
    """The document is illustrated; the questions have pictures, of two sizes, or none."""
    shown = [picture(9)]
    return [
        make(model, RULES, "which?", "the red one", picture(0), stage=stage, in_document=shown),
        make(model, RULES, "which?", "no", picture(1), stage=stage, in_document=shown),
        make(
            model,
            RULES,
            "and how many?",
            "three of them are blue",
            picture(2, 84),
            picture(3),
            stage=stage,
            in_document=shown,
        ),  # fmt: skip
        make(model, RULES, "x", "y", stage=stage, in_document=shown),
    ]


def two_documents(model):
    return [
        make(model, RULES, "which?", "the red one", picture(0)),
        make(model, OTHER, "which?", "no", picture(1)),
        make(model, RULES, "how many?", "three", picture(0)),
        make(model, OTHER, "colour", "blue"),
        make(model, RULES, "x", "y"),
    ]


def alone(model, row):
    """Summed loss of a row by itself, from all its logits."""
    e = row.encoded
    features = mx.concatenate(model.features(e.images)) if e.images else None
    logits = model.head(model.hidden(model.embed(e.ids[None], features), mx.array(e.position_ids[:, None])))[
        0
    ]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    picked = mx.take_along_axis(logprobs[:-1], mx.array(e.ids[1:])[:, None], axis=-1).squeeze(-1)
    return -(picked * mx.array(row.weights[1:])).sum()


def assert_equal(model, micros, rows):
    def shared(_):
        return sum(sft_loss(*micro_logprobs(model, micro))[0] for micro in micros)

    def plain(_):
        return sum(alone(model, row) for row in rows)

    loss, gradients = nn.value_and_grad(model.net, shared)(0)
    expected_loss, expected = nn.value_and_grad(model.net, plain)(0)
    assert sum(m.count for m in micros) == sum(r.weights.sum() for r in rows)
    assert abs(loss.item() - expected_loss.item()) < 1e-5 * expected_loss.item()
    expected = dict(tree_flatten(expected))
    for name, value in tree_flatten(gradients):
        norm = mx.linalg.norm(expected[name]).item()
        assert norm > 0 and mx.linalg.norm(value - expected[name]).item() < 1e-4 * norm, name


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_one_document(model, stage):
    rows = one_document(model, stage)
    micro = micro_batch(rows, model.pad_id)
    assert len(micro.prefix.images) == 1 and len(micro.tails.images) == 4
    assert micro.prefix.weights.any() == (stage == "cpt")
    assert_equal(model, [micro], rows)


def test_several_documents_with_unequal_numbers_of_rows(model):
    rows = two_documents(model)
    micro = micro_batch(rows, model.pad_id, groups=[[0, 2, 4], [1, 3]])
    assert micro.prefix.lengths.tolist()[0] != micro.prefix.lengths.tolist()[1]
    assert micro.owner.tolist() == [0, 0, 0, 1, 1]
    assert_equal(model, [micro], rows)


def test_a_shared_picture_lies_in_the_prefix(model):
    rows = [make(model, RULES, q, "yes", picture(0)) for q in ("which?", "how many are red?")]
    micro = micro_batch(rows, model.pad_id)
    assert len(micro.prefix.images) == 1 and not micro.tails.images
    assert_equal(model, [micro], rows)


def test_left_over_rows(model):
    """Micro-batches of two of five rows: the last is alone, and nothing is shared in it."""
    rows = [*one_document(model), make(model, None, "colour", "blue", picture(4))]
    micros = [micro_batch([rows[i] for i in part], model.pad_id) for part in by_length(rows, 2)]
    assert len(micros) == 3 and micros[-1].prefix is None
    assert any(m.prefix is not None for m in micros)
    assert_equal(model, micros, rows)


def test_pictures_of_one_size_are_not_taken_for_each_other(model):
    rows = [make(model, RULES, "which?", "no", picture(seed)) for seed in (0, 1)]
    first, second = (r.encoded for r in rows)
    assert (first.ids == second.ids).all()  # the tokens do not tell
    assert common_prefix(rows) == np.flatnonzero(first.visual)[0]
