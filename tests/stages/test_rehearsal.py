"""Texts that the base model writes and that are trained on beside the stage's rows."""

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.errors import DataError
from mpi_mlx.models import load_model
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.recipe import LoraSpec, RlStage, SftStage
from mpi_mlx.recipe_stages import REHEARSAL_TOKENS
from mpi_mlx.rollouts.rewards import build_rewards
from mpi_mlx.stages.rehearsal import TEXTS, Rehearsal, RehearsalMicro, first_words
from mpi_mlx.stages.rl import RolloutSource
from mpi_mlx.stages.rl_objective import LabelledMicro
from mpi_mlx.stages.supervised import SupervisedObjective, SupervisedSource
from mpi_mlx.training.batch import micro_batch
from mpi_mlx.training.fit import fit
from mpi_mlx.training.forward import micro_logprobs
from mpi_mlx.training.optimizer import Optimizer


def all_rows(model, seed):
    rehearsal = Rehearsal(model, seed)
    return [rehearsal.row(n) for n in range(TEXTS)]


def test_the_base_writes_them_and_all_it_wrote_is_trained(adapted, base_folder):
    base = load_model(base_folder)
    attach_lora(base, LoraSpec(rank=2))  # zero: the model is its base
    words = set(first_words(base.tokenizer))
    for trained, untrained in zip(all_rows(adapted(), 3), all_rows(base, 3), strict=True):
        np.testing.assert_array_equal(trained.encoded.ids, untrained.encoded.ids)
        given = int(np.argmax(trained.weights > 0))
        assert 1 <= given <= 8 and trained.weights[given:].all() and not trained.weights[:given].any()
        assert base.tokenizer.decode(trained.encoded.ids[:given]) in words
        assert given < len(trained) <= REHEARSAL_TOKENS
    assert any(
        list(a.encoded.ids) != list(b.encoded.ids) for a, b in zip(all_rows(base, 3), all_rows(base, 4), strict=True)
    )


def test_words_to_begin_with():
    class Tokenizer:
        def __init__(self, *pieces):
            self.pieces = pieces

        def __len__(self):
            return len(self.pieces)

        def convert_ids_to_tokens(self, ids):
            return [self.pieces[i] for i in ids]

    assert first_words(Tokenizer("ĠThe", "▁The", "Go", "cube", "<pad>", "12", "Paris")) == ["Paris", "The"]
    assert first_words(Tokenizer("Go", "cube", "é")) == ["Go", "cube"]
    with pytest.raises(DataError, match="rehearsal: no token of this model is a word"):
        first_words(Tokenizer("12", "é", "<pad>"))


def test_sampling_leaves_dropout_on(adapted):
    model = adapted(dropout=0.5)
    model.net.train()
    Rehearsal(model, 0).row(0)
    assert model.net.training and model.adapters.enabled


def test_their_share_and_what_the_survey_counts(model, dataset):
    spec = SftStage(stage="sft", steps=50, batch_size=8, rehearsal=0.25)
    source = SupervisedSource(model, dataset.train, None, spec, 5)
    picked = [source._pick(n) for n in range(400)]
    rehearsed = {p for p in picked if p[0] >= len(dataset.train)}
    assert 70 <= sum(p in rehearsed for p in picked) <= 130  # 100 expected, 4 deviations of 8.7
    assert all(len(dataset.train) <= index < len(dataset.train) + TEXTS and not carries for index, carries in rehearsed)
    assert len(rehearsed) > TEXTS / 2
    assert source.survey(50).rows == len(dataset.train)
    names = source.batch(0).identities
    assert {n for n in names if not n.startswith("rehearsal")} <= {e.id for e in dataset.train}


def test_rehearsal_keeps_what_the_base_wrote_likely(adapted, base_folder, dataset):
    """Of texts that were not rehearsed: trained with rehearsal they become half as unlikely, or less."""

    def rise(share: float) -> float:
        model = load_model(base_folder)
        attach_lora(model, LoraSpec(rank=4), mx.random.key(0))
        held_out = micro_batch(all_rows(model, 77), model.pad_id)

        def loss() -> float:
            return -micro_logprobs(model, held_out)[0].mean().item()

        before = loss()
        spec = SftStage(stage="sft", steps=30, batch_size=8, learning_rate=0.02, rehearsal=share)
        optimizer = Optimizer(spec.optimizer)
        optimizer.init(model.net.trainable_parameters())
        source = SupervisedSource(model, dataset.train, None, spec, 5)
        for _ in fit(model.net, source, SupervisedObjective(model), spec, total=30, seed=5, optimizer=optimizer):
            pass
        return loss() - before

    plain, rehearsed = rise(0.0), rise(0.5)
    assert plain > 0.1 and rehearsed < plain / 2


def test_a_place_loses_the_divergence_from_the_base(adapted, base_folder):
    """By numpy, from the logits of whole forwards; texts of different lengths, one of them twice."""
    model, base = adapted(), load_model(base_folder)
    picked = [3, 0, 3]
    expected = places = 0.0
    for index in picked:
        row = Rehearsal(model, 3).row(index)
        logits = [np.array(_logits(m, row.encoded), np.float64) for m in (base, model)]
        old, new = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
        divergence = (np.exp(old) * (old - new)).sum(-1)[:-1]
        expected += (divergence * row.weights[1:]).sum()
        places += row.weights.sum()
    micro = Rehearsal(model, 3).micro(picked)
    loss, _ = SupervisedObjective(model)(micro)
    assert expected > 0.1 and micro.count == places
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)


def _logits(model, encoded):
    ids, positions = mx.array(encoded.ids)[None], mx.array(encoded.position_ids)[:, None]
    return model.head(model.hidden(model.embed(ids), positions if model.uses_mrope else positions[0]))[0]


def test_a_model_that_is_its_base_has_nothing_to_lose(base_folder):
    model = load_model(base_folder)
    attach_lora(model, LoraSpec(rank=2))
    loss, _ = SupervisedObjective(model)(Rehearsal(model, 3).micro([0, 1]))
    assert abs(loss.item()) < 1e-4


def test_in_rl_they_take_the_place_of_labelled_rows(model, dataset):
    spec = RlStage(
        stage="rl", steps=2, prompts=2, group_size=2, max_completion_tokens=4, sft_coef=0.1, sft_batch_size=3,
        rehearsal=1.0,
    )
    source = RolloutSource(model, dataset.rl, None, spec, build_rewards(spec.rewards), 5, dataset.train)
    (mixed,) = [m for m in source.batch(0).micros if isinstance(m, LabelledMicro)]
    assert len(mixed.batch.batch.identities) == 3
    assert isinstance(mixed.batch, RehearsalMicro) and mixed.scale > 0
