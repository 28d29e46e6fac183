from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.models import load_model
from mpi_mlx.models.gradient_checkpointing import enable_gradient_checkpointing
from mpi_mlx.recipe import RlStage
from mpi_mlx.rollouts.groups import compute_advantages, overlong_penalty
from mpi_mlx.rollouts.rewards import build_rewards
from mpi_mlx.stages.build import prepare_stages
from mpi_mlx.stages.rl import RolloutSource
from mpi_mlx.stages.rl_objective import LabelledMicro, RolloutMicro, RolloutObjective
from mpi_mlx.stages.supervised import SupervisedObjective
from mpi_mlx.stages.survey import Survey
from mpi_mlx.training import score as score_module
from mpi_mlx.training.optimizer import Optimizer
from mpi_mlx.training.score import score_plain

RULES = PolicyDocument.from_text("If there is a red cube reply yes. Otherwise reply no. " * 3, "rules")


@pytest.fixture()
def model(adapted):
    return short_spoken(adapted())


def short_spoken(model):
    """Ends a completion at one token in eight, so that lengths differ."""
    model.eos_ids = frozenset(range(0, model.vocab_size, 8))
    return model


class Rewards:
    """``give``: (number of the completion within its prompt, example) -> reward."""

    kinds = ("given",)

    def __init__(self, give):
        self.give, self.seen = give, []

    def __call__(self, texts, examples):
        values, counts = [], {}
        for example in examples:
            counts[example.id] = counts.get(example.id, -1) + 1
            values.append(self.give(counts[example.id], example))
        self.seen += [e.id for e in examples]
        values = np.array(values, np.float32)
        return values, {"given": values}


def spec_of(**changes):
    usual = {"stage": "rl", "steps": 2, "prompts": 2, "group_size": 3, "max_completion_tokens": 6}
    return RlStage(**usual | changes)


def source_of(model, dataset, spec, give=lambda n, e: float(n % 2), labelled=()):
    return RolloutSource(model, dataset.rl, RULES, spec, Rewards(give), 5, labelled)


def groups_of(batch):
    return [g for m in batch.micros if isinstance(m, RolloutMicro) for g in m.groups]


def plain_scores(model, micro):
    """Log-probabilities of each completion behind its plain prompt, one forward each."""
    model.net.eval()
    prompts = [g.prompt for g in micro.groups for _ in g.rollouts]
    found = [
        np.array(score_plain(model, p, r.completion_ids))
        for p, r in zip(prompts, micro.rollouts, strict=True)
    ]
    model.net.train()
    return found


def advantages_of(micro):
    return np.concatenate([g.advantages for g in micro.groups])


def sequence_loss(old, new, advantages, low, high):
    """GRPO's objective by hand: sum of row means, tokens clipped below and above, tokens."""
    total, below, above, tokens = 0.0, 0, 0, 0
    for o, n, a in zip(old, new, advantages, strict=True):
        ratio = np.exp(n - o)
        total += -np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a).mean()
        below += int(((ratio < 1 - low) & (a < 0)).sum())
        above += int(((ratio > 1 + high) & (a > 0)).sum())
        tokens += len(ratio)
    return total, below, above, tokens


# ---- rollouts


def test_advantages_are_centred_over_plain_and_policy_aware_together(model, dataset):
    """Every policy-aware completion earns 1, every plain one 0: apart, nobody would have an advantage."""
    spec = spec_of(policy_aware=2)
    batch = source_of(model, dataset, spec, lambda n, e: float(n >= 3)).batch(0)
    groups = groups_of(batch)
    assert len(groups) == 2
    for group in groups:
        assert [r.policy_aware for r in group.rollouts] == [False] * 3 + [True] * 2
        assert [r.reward for r in group.rollouts] == [0, 0, 0, 1, 1]
        np.testing.assert_allclose(group.advantages, compute_advantages(np.array([0, 0, 0, 1, 1])))
        assert group.advantages[0] < 0 < group.advantages[4]
    assert batch.metrics["reward_plain"] == 0 and batch.metrics["reward_policy_aware"] == 1
    assert batch.metrics["reward"] == pytest.approx(0.4) and batch.metrics["reward/given"] == 0


def test_without_negative_weight_only_the_better_are_forwarded_and_the_loss_is_the_same(model, dataset):
    """The losses of all rollouts with the worse ones' advantages at 0, divided by the number of all."""

    def loss_of(batch):
        objective = RolloutObjective(model, spec)
        return sum(objective(m)[0].item() for m in batch.micros) / batch.count

    spec = spec_of(policy_aware=2, negative_weight=0.0)
    batch = source_of(model, dataset, spec).batch(0)  # rewards 0, 1, 0, 1, 0
    groups = groups_of(batch)
    assert [[r.reward for r in g.rollouts] for g in groups] == [[1.0, 1.0]] * 2
    assert all((g.advantages > 0).all() for g in groups) and batch.metrics["reward"] == pytest.approx(0.4)
    whole = source_of(model, dataset, spec_of(policy_aware=2)).batch(0)
    assert whole.count == batch.count == 10
    for micro in whole.micros:
        micro.groups = [replace(g, advantages=np.maximum(g.advantages, 0)) for g in micro.groups]
    assert loss_of(batch) == pytest.approx(loss_of(whole), rel=1e-5) and loss_of(batch) < -0.1


@pytest.mark.parametrize("sampler", ["model", "reference"])
def test_who_draws_what_from_which_prompt(model, dataset, sampler):
    spec = spec_of(policy_aware=2, policy_aware_sampler=sampler)
    batch = source_of(model, dataset, spec).batch(0)
    examples = {e.id: e for e in dataset.rl}
    model.net.eval()
    for group in groups_of(batch):
        example = examples[group.identity]
        plain = model.encode(example.messages, generation_prompt=True)
        assert (group.prompt.ids == plain.ids).all()  # what the loss will condition on
        aware = model.encode(place_document(example.messages, RULES), generation_prompt=True)
        for rollout in group.rollouts:
            own, other = (aware, plain) if rollout.policy_aware else (plain, aware)
            if rollout.policy_aware and sampler == "reference":
                with model.adapters_disabled():
                    drawn = np.array(score_plain(model, own, rollout.completion_ids))
                unlike = np.array(score_plain(model, own, rollout.completion_ids))
            else:
                drawn = np.array(score_plain(model, own, rollout.completion_ids))
                unlike = np.array(score_plain(model, other, rollout.completion_ids))
            np.testing.assert_allclose(rollout.sampled_logprobs, drawn, atol=1e-4)
            assert np.abs(rollout.sampled_logprobs - unlike).max() > 1e-3


def test_the_same_step_draws_the_same_and_others_draw_others(model, dataset):
    def ids(source, step):
        groups = sorted(groups_of(source.batch(step)), key=lambda g: g.identity)
        return [(g.identity, r.completion_ids.tolist()) for g in groups for r in g.rollouts]

    one, two = (source_of(model, dataset, spec_of()) for _ in range(2))
    first, second = ids(one, 0), ids(one, 1)
    assert ids(two, 0) == first and two.state() == {"cursor": 2}
    continued = source_of(model, dataset, spec_of())
    continued.load_state({"cursor": 2})
    assert ids(continued, 1) == second != first
    assert len({tuple(c) for _, c in first}) > 3  # the completions of a prompt differ


def test_a_prompts_draw_does_not_depend_on_its_neighbours(model, dataset):
    """What makes the number of processes not matter."""
    spec = spec_of(prompts=4, policy_aware=1)
    together = {g.identity: g for g in groups_of(source_of(model, dataset, spec).batch(0))}
    single = source_of(model, dataset, spec_of(prompts=1, policy_aware=1))
    for _ in range(4):
        (group,) = groups_of(single.batch(0))
        for a, b in zip(group.rollouts, together[group.identity].rollouts, strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist() and a.policy_aware == b.policy_aware


def test_overlong_completions_are_punished(model, dataset):
    spec = spec_of(max_completion_tokens=8, overlong_buffer=6)
    groups = groups_of(source_of(model, dataset, spec, lambda n, e: 1.0).batch(0))
    rollouts = [r for g in groups for r in g.rollouts]
    assert any(len(r.completion_ids) == 8 for r in rollouts)
    for rollout in rollouts:
        assert rollout.reward == pytest.approx(1.0 + overlong_penalty(len(rollout.completion_ids), 8, 6))
        assert rollout.rewards["given"] == 1.0  # as it was


# ---- DAPO's refill


def test_refill_draws_until_every_group_has_signal(model, dataset):
    poor = {e.id for e in dataset.rl[::2]}  # their completions all earn alike
    spec = spec_of(algorithm="dapo", prompts=3, max_refill=4)
    source = source_of(model, dataset, spec, lambda n, e: 0.5 if e.id in poor else float(n % 2))
    batch = source.batch(0)
    groups = groups_of(batch)
    assert len(groups) == 3 and all(g.has_signal and g.identity not in poor for g in groups)
    rounds = batch.metrics["refill_rounds"]
    assert rounds >= 1 and source.cursor == 3 * (rounds + 1) and len(source.rewards.seen) == 3 * source.cursor
    assert batch.metrics["groups_trained"] == 3
    signal = np.mean([source._example(p).id not in poor for p in range(source.cursor)])
    assert batch.metrics["groups_with_signal"] == pytest.approx(signal)


def test_refill_is_bounded(model, dataset):
    spec = spec_of(algorithm="dapo", prompts=1, max_refill=2)
    source = source_of(model, dataset, spec, lambda n, e: 1.0)
    batch = source.batch(0)
    assert batch.metrics["refill_rounds"] == 2 and source.cursor == 3
    assert batch.metrics["groups_trained"] == 0 and not batch.micros and batch.tokens == 0
    keeps = source_of(model, dataset, spec_of(prompts=1), lambda n, e: 1.0).batch(0)  # grpo
    assert keeps.metrics["groups_trained"] == 1 and keeps.metrics["refill_rounds"] == 0


# ---- the loss


@pytest.mark.parametrize("dropout, checkpointing", [(0.0, False), (0.5, False), (0.5, True)])
def test_the_ratio_is_one_on_the_first_update(adapted, dataset, dropout, checkpointing):
    """Then the loss is minus the advantages, with dropout too, which rl leaves out of sampling and updates alike."""
    model = short_spoken(adapted(dropout))
    enable_gradient_checkpointing(model, checkpointing)
    spec = spec_of(policy_aware=2, clip_low=0.001, clip_high=0.001)
    batch = source_of(model, dataset, spec, lambda n, e: float(n == 0) + 0.3 * (n == 4)).batch(0)
    assert not model.net.training
    (micro,) = batch.micros
    total, metrics = RolloutObjective(model, spec)(micro)
    assert batch.count == 2 * 5
    assert total.item() == pytest.approx(-advantages_of(micro).sum(), abs=1e-5)
    assert metrics["clip_fraction"][0].item() == 0
    drift = metrics["drift"][0].item() / metrics["drift"][1].item()
    assert drift < 1e-4


def test_the_first_gradient_is_the_policy_gradient(model, dataset):
    """Minus each completion's mean log-probability behind its plain prompt, times its advantage."""
    spec = spec_of(policy_aware=1)
    (micro,) = source_of(model, dataset, spec).batch(0).micros
    objective, advantages = RolloutObjective(model, spec), advantages_of(micro)
    prompts = [g.prompt for g in micro.groups for _ in g.rollouts]

    def plain(_):
        rows = zip(prompts, micro.rollouts, advantages, strict=True)
        return sum(-float(a) * score_plain(model, p, r.completion_ids).mean() for p, r, a in rows)

    expected = dict(tree_flatten(nn.value_and_grad(model.net, plain)(0)[1]))
    for name, value in tree_flatten(nn.value_and_grad(model.net, objective)(micro)[1]):
        norm = mx.linalg.norm(expected[name]).item()
        assert norm > 0 and mx.linalg.norm(value - expected[name]).item() < 1e-3 * norm, name


def test_policy_aware_completions_are_trained_on_the_plain_prompt(model, dataset):
    """The ratio moves as the plain prompt's log-probabilities do; with the document they move otherwise."""
    spec = spec_of(policy_aware=2, clip_low=0.9, clip_high=0.9)
    (micro,) = source_of(model, dataset, spec).batch(0).micros
    objective = RolloutObjective(model, spec)
    objective(micro)
    old = plain_scores(model, micro)
    examples = {e.id: e for e in dataset.rl}
    aware_prompts = [
        model.encode(place_document(examples[g.identity].messages, RULES), generation_prompt=True)
        for g in micro.groups for _ in g.rollouts
    ]  # fmt: skip

    def as_sampled():
        model.net.eval()
        out = [
            np.array(score_plain(model, p, r.completion_ids)) if r.policy_aware else plain
            for p, r, plain in zip(aware_prompts, micro.rollouts, plain_scores(model, micro), strict=True)
        ]
        model.net.train()
        return out

    wrong_old = as_sampled()
    mx.random.seed(9)
    model.net.update(
        tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.net.trainable_parameters())
    )
    total, _ = objective(micro)
    expected, *_ = sequence_loss(old, plain_scores(model, micro), advantages_of(micro), 0.9, 0.9)
    wrong, *_ = sequence_loss(wrong_old, as_sampled(), advantages_of(micro), 0.9, 0.9)
    assert total.item() == pytest.approx(expected, abs=1e-4)
    assert abs(wrong - expected) > 1e-2


def test_minibatches_share_the_prompts_and_are_measured_against_the_model_that_drew_them(model, dataset):
    spec = spec_of(prompts=5, minibatches=2, updates_per_rollout=3, sft_coef=0.1, sft_batch_size=2)
    batch = source_of(model, dataset, spec, labelled=dataset.train).batch(1)
    whole = source_of(model, dataset, spec_of(prompts=5)).batch(1)
    (second,) = batch.minibatches
    assert (batch.updates, batch.count, second.count) == (3, 9, 6)
    assert sorted(g.identity for b in (batch, second) for g in groups_of(b)) == sorted(
        g.identity for g in groups_of(whole)
    )
    assert batch.metrics == pytest.approx(whole.metrics) and batch.tokens > whole.tokens
    labelled = [[m.batch.identities for m in b.micros if isinstance(m, LabelledMicro)] for b in (batch, second)]
    assert labelled[0] != labelled[1]
    drawn = [m for b in (batch, second) for m in b.micros if isinstance(m, RolloutMicro)]
    for micro in drawn:
        scores = plain_scores(model, micro)
        for row, expected in enumerate(scores):
            np.testing.assert_allclose(micro.old_logprobs[row, : len(expected)], expected, atol=1e-4)
        _, metrics = RolloutObjective(model, spec)(micro)
        assert metrics["drift"][0].item() / metrics["drift"][1].item() < 1e-4


def test_a_minibatch_without_signal_is_left_out(model, dataset):
    """Of four prompts one has completions that differ: one update, not two."""
    chosen = source_of(model, dataset, spec_of(prompts=4)).batch(0).identities[2]
    spec = spec_of(prompts=4, minibatches=2, drop_constant=True)
    batch = source_of(model, dataset, spec, lambda n, e: float(n % 2 and e.id == chosen)).batch(0)
    assert batch.identities == (chosen,) and not batch.minibatches
    nothing = source_of(model, dataset, spec, lambda n, e: 0.0).batch(0)
    assert not nothing.identities and not nothing.minibatches


def test_later_updates_are_clipped_on_both_sides(model, dataset):
    spec = spec_of(
        algorithm="dapo", aggregation="sequence", prompts=3, updates_per_rollout=3, clip_low=0.05,
        clip_high=0.1, max_completion_tokens=8,
    )  # fmt: skip
    batch = source_of(model, dataset, spec).batch(0)
    (micro,) = batch.micros
    assert batch.updates == 3
    objective, optimizer = RolloutObjective(model, spec), Optimizer("adamw")
    optimizer.init(model.net.trainable_parameters())
    old = plain_scores(model, micro)
    for update in range(3):
        new = plain_scores(model, micro)
        (total, metrics), gradients = nn.value_and_grad(model.net, objective)(micro)
        expected, below, above, tokens = sequence_loss(old, new, advantages_of(micro), 0.05, 0.1)
        assert total.item() == pytest.approx(expected, abs=1e-4)
        clipped, count = (x.item() for x in metrics["clip_fraction"])
        assert (clipped, count) == (below + above, tokens)
        assert ("drift" in metrics) == (update == 0)
        optimizer.update(model.net, gradients, 0.02)
    assert below > 0 and above > 0  # in the last update both bounds were active


def test_kl_is_that_of_two_models(model, dataset, base_folder):
    spec = spec_of(policy_aware=1, kl_coef=0.5)
    (micro,) = source_of(model, dataset, spec).batch(0).micros
    total, metrics = RolloutObjective(model, spec)(micro)
    reference = load_model(base_folder)  # has never had adapters
    kls = []
    for theirs, ours in zip(plain_scores(reference, micro), plain_scores(model, micro), strict=True):
        difference = theirs - ours
        kls.append(np.exp(difference) - difference - 1)
    summed, tokens = (x.item() for x in metrics["kl"])
    assert tokens == sum(map(len, kls))
    assert summed == pytest.approx(sum(k.sum() for k in kls), rel=1e-4) and summed > 1e-3
    means = sum(k.mean() for k in kls)  # a row's mean, as the surrogate's
    assert total.item() == pytest.approx(-advantages_of(micro).sum() + 0.5 * means, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("algorithm, scaled", [("grpo", True), ("dapo", True), ("dr_grpo", False)])
def test_normalisers(model, dataset, algorithm, scaled):
    spec = spec_of(algorithm=algorithm, max_completion_tokens=7)
    batch = source_of(model, dataset, spec).batch(0)
    rollouts = [r for g in groups_of(batch) for r in g.rollouts]
    lengths = np.array([len(r.completion_ids) for r in rollouts])
    expected = {"grpo": 6, "dapo": lengths.sum(), "dr_grpo": 6 * 7}[algorithm]
    assert batch.count == expected
    advantages = np.concatenate([compute_advantages(np.array([0, 1, 0]), scale=scaled)] * 2)
    total = sum(RolloutObjective(model, spec)(m)[0].item() for m in batch.micros)
    assert len(set(lengths)) > 1
    weights = np.ones(6) if algorithm == "grpo" else lengths
    assert total == pytest.approx(-(advantages * weights).sum(), abs=1e-4)


def test_how_groups_are_split_into_forwards_changes_nothing(model, dataset):
    def loss(micro_tokens):
        spec = spec_of(prompts=4, algorithm="dapo", kl_coef=0.0, micro_tokens=micro_tokens, refill=False)
        batch = source_of(model, dataset, spec, lambda n, e: float(n == int(e.id[-1]) % 3)).batch(0)
        objective = RolloutObjective(model, spec)
        return len(batch.micros), sum(objective(m)[0].item() for m in batch.micros) / batch.count

    (one, whole), (many, split) = loss(8192), loss(1)
    assert (one, many) == (1, 4) and split == pytest.approx(whole, abs=1e-6) and abs(whole) > 1e-3


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trees_and_rows_give_the_same(model, dataset, monkeypatch, checkpointed):
    """KL, policy-aware rollouts and all: whichever way completions are scored."""
    spec = spec_of(prompts=3, group_size=6, policy_aware=2, kl_coef=0.1)

    def loss(spared):
        monkeypatch.setattr(score_module, "trees_spare", lambda groups, layers: [spared] * len(groups))
        batch = source_of(model, dataset, spec, lambda n, e: float(n % 3)).batch(0)
        objective = RolloutObjective(model, spec)
        value, grads = nn.value_and_grad(model.net, lambda: sum(objective(m)[0] for m in batch.micros) / batch.count)()
        return value.item(), dict(tree_flatten(grads))

    expected, plain = loss(-1)
    enable_gradient_checkpointing(model, checkpointed)
    value, grads = loss(1)
    enable_gradient_checkpointing(model, False)
    assert value == pytest.approx(expected, abs=1e-6) and abs(value) > 1e-3
    for name in plain:
        assert mx.abs(grads[name] - plain[name]).max().item() <= 1e-4 * mx.abs(plain[name]).max().item() + 1e-7, name


def test_importance_weights_are_the_ratio_to_the_sampler(model, dataset):
    spec = spec_of(policy_aware=2, importance_weight=True)
    (micro,) = source_of(model, dataset, spec).batch(0).micros
    total, _ = RolloutObjective(model, spec)(micro)
    scored = plain_scores(model, micro)
    weights = [
        np.minimum(2.0, np.exp(s - r.sampled_logprobs)) for s, r in zip(scored, micro.rollouts, strict=True)
    ]
    for w, rollout in zip(weights, micro.rollouts, strict=True):
        if not rollout.policy_aware:
            np.testing.assert_allclose(w, 1.0, atol=1e-4)  # the model itself drew them
    assert max(abs(w - 1).max() for w in weights) > 0.01
    means = np.array([w.mean() for w in weights])  # "sequence": each completion's mean over its tokens
    assert total.item() == pytest.approx(-(advantages_of(micro) * means).sum(), abs=1e-4)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_labelled_rows_mixed_in(model, dataset, fraction):
    """The step's loss is the surrogate's plus sft_coef times the labelled rows' mean."""
    spec = spec_of(sft_coef=0.5, sft_batch_size=2, document_fraction=fraction)
    batch = source_of(model, dataset, spec, labelled=dataset.train).batch(0)
    labelled = [m for m in batch.micros if isinstance(m, LabelledMicro)]
    objective = RolloutObjective(model, spec)
    total = sum(objective(m)[0].item() for m in batch.micros) / batch.count
    plain = SupervisedObjective(model)
    mean = sum(plain(m.batch)[0].item() for m in labelled) / sum(m.batch.count for m in labelled)
    advantages = np.concatenate([g.advantages for g in groups_of(batch)])
    assert total == pytest.approx(-advantages.sum() / 6 + 0.5 * mean, rel=1e-5)
    text = model.tokenizer.decode(labelled[0].batch.tails.ids[0])
    prefix = labelled[0].batch.prefix
    text += model.tokenizer.decode(prefix.ids[0]) if prefix is not None else ""
    assert ("red cube reply yes" in text) == (fraction == 1.0)


def test_labelled_rows_count_where_no_group_is_kept(model, dataset):
    """Rewards are all alike and dropped: what is left is sft_coef times the labelled rows' mean."""
    spec = spec_of(sft_coef=0.5, sft_batch_size=2, drop_constant=True, refill=False)
    batch = source_of(model, dataset, spec, lambda n, e: 1.0, labelled=dataset.train).batch(0)
    assert batch.metrics["groups_trained"] == 0
    objective, plain = RolloutObjective(model, spec), SupervisedObjective(model)
    total = sum(objective(m)[0].item() for m in batch.micros) / batch.count
    mean = sum(plain(m.batch)[0].item() for m in batch.micros) / sum(m.batch.count for m in batch.micros)
    assert total == pytest.approx(0.5 * mean, rel=1e-5) and total > 0.1


def test_refusals(model, dataset):
    with pytest.raises(DataError, match="no prompts"):
        RolloutSource(model, (), RULES, spec_of(), Rewards(None), 0)
    with pytest.raises(DataError, match="policy_aware needs a document"):
        RolloutSource(model, dataset.rl, None, spec_of(policy_aware=1), Rewards(None), 0)


def test_the_survey_sees_the_labelled_rows_of_every_minibatch(model, dataset):
    """One step of two minibatches of two labelled rows: four of the five."""
    spec = spec_of(steps=1, minibatches=2, sft_coef=0.1, sft_batch_size=2)
    recipe = SimpleNamespace(stages=[spec], seed=3, folder=Path())
    (found,) = prepare_stages(model, recipe, dataset)
    assert found.labelled.rows == 4 and found.prompts.rows == 2


def test_the_survey_of_prompts(model, dataset):
    """Six prompts, two a step: four of them in two steps, all of them in three or more."""
    lengths = [len(model.encode(e.messages, generation_prompt=True)) for e in dataset.rl]
    rewards = build_rewards([SimpleNamespace(kind="exact_match", weight=1.0)])

    def survey(steps, examples=dataset.rl, rewards=rewards, document=None, **changes):
        return RolloutSource(model, examples, document, spec_of(**changes), rewards, 5).survey(steps)

    few = RolloutSource(model, dataset.rl, None, spec_of(), rewards, 5)
    drawn = {id(few._example(position)) for position in range(4)}
    assert len(drawn) == 4
    assert survey(2) == Survey(4, max(n for n, e in zip(lengths, dataset.rl, strict=True) if id(e) in drawn))
    assert survey(3) == survey(50) == survey(3, document=RULES, policy_aware=1) == Survey(6, max(lengths))

    odd = [replace(e, source=f"rl.jsonl:{n}") for n, e in enumerate(dataset.rl, 1)]
    odd[1] = replace(odd[1], answer=None)
    odd[4] = replace(odd[4], messages=({"role": "user", "content": "<|image_pad|>"},))
    with pytest.raises(DataError) as error:
        survey(3, odd)
    said = sorted(str(error.value).splitlines()[1:])
    assert "rl.jsonl:2 (example " in said[0] and "no answer; reward exact_match compares with it" in said[0]
    assert "rl.jsonl:5 (example " in said[1] and "image placeholder" in said[1] and len(said) == 2
    unasked = build_rewards([SimpleNamespace(kind="format", weight=1.0)])
    assert survey(3, odd[:4], unasked).rows == 4  # no answers are needed then
    plain = [replace(e, meta={}) for e in dataset.rl]
    with pytest.raises(DataError, match="6 errors(.|\n)*reward trace needs meta.tree"):
        survey(3, plain, build_rewards([SimpleNamespace(kind="trace", weight=1.0)]))


def test_the_survey_does_not_call_ones_own_function(model, dataset, tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, examples):\n    raise ValueError\n")
    spec = SimpleNamespace(kind="function", function=f"{tmp_path / 'mine.py'}:score", weight=1.0)
    rewards = build_rewards([spec])
    assert RolloutSource(model, dataset.rl, None, spec_of(), rewards, 5).survey(3).rows == 6
