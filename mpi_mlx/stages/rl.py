"""``rl``: GRPO, DAPO or Dr.GRPO, each with or without PolicyRollout (arXiv 2510.09474, section 3.3).

Group-relative policy optimization: arXiv 2402.03300; DAPO: 2503.14476; Dr.GRPO: 2503.20783. With PolicyRollout a
group is the union of completions drawn from the plain prompt and of completions drawn with the document in
context; every one of them is scored, and trained, on the plain prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.rollouts.groups import Rollout, RolloutGroup, compute_advantages, overlong_penalty
from mpi_mlx.rollouts.sampler import Completion, sample_mixed
from mpi_mlx.stages.ahead import Ahead, steps_ahead
from mpi_mlx.stages.rl_objective import LabelledMicro, RolloutMicro
from mpi_mlx.stages.supervised import SupervisedSource
from mpi_mlx.stages.survey import Survey, survey_prompts
from mpi_mlx.training import world
from mpi_mlx.training.fit import Batch
from mpi_mlx.training.score import forwards, score

NOTHING = 1e-9  # the count of a part none of whose groups is kept


class RolloutSource:
    """Draws the step's rollouts when the step begins. Its state is where it stands in the prompts.

    ``prompts`` and ``group_size`` count for each process; every process takes its own prompts.
    """

    def __init__(
        self, model, examples: Sequence, document: PolicyDocument | None, spec, rewards, seed: int,
        labelled: Sequence = (),
    ):
        if not examples:
            raise DataError("stage rl: no prompts; give data.rl (answers to check) or data.train")
        if spec.policy_aware and document is None:
            raise DataError("stage rl: policy_aware needs a document; set data.document or policy_aware: 0")
        self.model, self.examples, self.document = model, examples, document
        self.spec, self.rewards, self.seed = spec, rewards, seed
        self.cursor = 0
        per_step = spec.prompts * world.world().size()
        steps = steps_ahead(model, spec.prompts * max(1, spec.policy_aware), spec.max_completion_tokens)
        self._ahead = Ahead(self._sample_reference, per_step, steps, None if spec.refill else spec.steps)
        self.labelled = None
        if spec.sft_coef > 0:
            self.labelled = SupervisedSource(model, labelled, document, _labelled_spec(spec), seed + 1)

    def state(self) -> dict:
        return {"cursor": self.cursor}

    def load_state(self, state: dict) -> None:
        self.cursor = int(state["cursor"])

    def batch(self, step: int) -> Batch:
        # no dropout, while sampling or in the updates: ratios, KL and drift compare the network with itself
        self.model.net.eval()
        spec = self.spec
        kept: list[RolloutGroup] = []
        drawn: list[RolloutGroup] = []
        rounds = 0
        while True:
            fresh = self._draw(spec.prompts)
            drawn += fresh
            rounds += 1
            kept += [g for g in fresh if g.has_signal] if spec.drop_constant else fresh
            enough = world.sum_numbers([float(len(kept) < spec.prompts)])[0] == 0
            if enough or not spec.refill or rounds > spec.max_refill:
                break
        kept = kept[: spec.prompts]
        parts = [self._part(kept[n :: spec.minibatches], step * spec.minibatches + n) for n in range(spec.minibatches)]
        first, *others = [p for p in parts if p.count > NOTHING] or parts[:1]
        first.updates, first.metrics = spec.updates_per_rollout, self._metrics(drawn, kept, rounds)
        first.tokens += sum(part.tokens for part in others)
        first.minibatches = others
        return first

    def _part(self, groups: list[RolloutGroup], number: int) -> Batch:
        """Groups of one update, with the labelled rows that go with them."""
        spec = self.spec
        trained = groups
        if spec.negative_weight == 0 and spec.kl_coef == 0:
            trained = [g.weighted() for g in groups if g.advantages.any()]
        parts = forwards([g.pair for g in trained], spec.micro_tokens, self.model.num_layers)
        micros = [RolloutMicro([trained[i] for i in part], tree) for part, tree in parts]
        if spec.kl_coef > 0:
            self._score_reference(micros)
        if spec.minibatches > 1:  # the model will have moved when the next part's turn comes
            self._score_old(micros)
        own = sum(len(r.completion_ids) for g in groups for r in g.rollouts)
        count, tokens = world.sum_numbers([_normaliser(groups, spec), own])
        tokens = round(tokens)
        if self.labelled is not None:
            count = count or 1.0  # labelled rows are learned from where no group has a signal, too
            labelled = self.labelled.batch(number)
            scale = spec.sft_coef * count / max(labelled.count, 1.0)
            micros += [LabelledMicro(m, scale) for m in labelled.micros]
            tokens += labelled.tokens
        return Batch(micros, max(count, NOTHING), tokens, identities=tuple(g.identity for g in groups))

    def survey(self, steps: int) -> Survey:
        """Looks at the prompts of the first ``steps`` steps, refills not counted; see ``survey_prompts``."""
        positions = range(steps * self.spec.prompts * world.world().size())
        drawn: dict[int, object] = {}
        for position in positions:
            example = self._example(position)
            drawn[id(example)] = example
            if len(drawn) == len(self.examples):
                break
        document = self.document if self.spec.policy_aware else None
        return survey_prompts(self.model, list(drawn.values()), document, self.rewards)

    # ---- drawing

    def _next_positions(self, count: int) -> list[int]:
        """This process' next places in the endless row of prompts; the processes take turns."""
        size, rank = world.world().size(), world.world().rank()
        out = [self.cursor + i * size + rank for i in range(count)]
        self.cursor += count * size
        return out

    def _example(self, position: int):
        epoch, at = divmod(position, len(self.examples))
        order = np.random.default_rng([self.seed, 31, epoch]).permutation(len(self.examples))
        return self.examples[order[at]]

    def _keys(self, positions: Sequence[int], policy_aware: bool) -> mx.array:
        """Random keys (P, 2) of the prompts' completions.

        They belong to a prompt's position, so that however many processes share a step, it draws the same.
        """
        numbers = [np.random.SeedSequence([self.seed, 32, p]).generate_state(1)[0] for p in positions]
        return mx.stack([mx.random.split(mx.random.key(int(n)))[int(policy_aware)] for n in numbers])

    def _prompts(self, positions: Sequence[int], document: PolicyDocument | None) -> list:
        examples = [self._example(p) for p in positions]
        return [
            self.model.encode(place_document(e.messages, document), tools=e.tools, generation_prompt=True)
            for e in examples
        ]

    def _sample(self, requests: list[tuple[object, int]], keys: mx.array) -> list[list[Completion]]:
        spec = self.spec
        return sample_mixed(
            self.model, requests, key=keys, max_tokens=spec.max_completion_tokens,
            temperature=spec.temperature, top_p=spec.top_p,
        )

    def _sample_reference(self, positions: list[int]) -> list[list[Completion]]:
        """Policy-aware completions, adapters switched off."""
        requests = [(p, self.spec.policy_aware) for p in self._prompts(positions, self.document)]
        with self.model.adapters_disabled():
            return self._sample(requests, self._keys(positions, True))

    def _draw(self, count: int) -> list[RolloutGroup]:
        spec, cursor = self.spec, self.cursor
        positions = self._next_positions(count)
        examples = [self._example(p) for p in positions]
        plain = self._prompts(positions, None)
        requests, keys = [(p, spec.group_size) for p in plain], self._keys(positions, False)
        if spec.policy_aware and spec.policy_aware_sampler == "reference":
            completions = self._sample(requests, keys) + self._ahead(positions, cursor)
        elif spec.policy_aware:
            requests += [(p, spec.policy_aware) for p in self._prompts(positions, self.document)]
            completions = self._sample(requests, mx.concatenate([keys, self._keys(positions, True)]))
        else:
            completions = self._sample(requests, keys)
        groups = []
        for n, example in enumerate(examples):
            found = [(c, False) for c in completions[n]]
            if spec.policy_aware:
                found += [(c, True) for c in completions[len(examples) + n]]
            groups.append((example, plain[n], found))
        return self._rewarded(groups)

    def _rewarded(self, groups: list[tuple]) -> list[RolloutGroup]:
        spec = self.spec
        flat = [(c, e, prompt) for e, prompt, found in groups for c, _ in found]
        texts = [self.model.turn_text(prompt, c.ids) for c, _, prompt in flat]
        total, parts = self.rewards(texts, [e for _, e, _ in flat])
        out, at = [], 0
        for example, prompt, found in groups:
            rollouts = []
            for completion, policy_aware in found:
                penalty = overlong_penalty(
                    len(completion.ids), spec.max_completion_tokens, spec.overlong_buffer
                )
                rollouts.append(
                    Rollout(
                        completion.ids, completion.logprobs, texts[at], float(total[at]) + penalty, policy_aware,
                        completion.finished, {kind: float(values[at]) for kind, values in parts.items()},
                    )
                )
                at += 1
            rewards = np.array([r.reward for r in rollouts])
            advantages = compute_advantages(
                rewards, scale=spec.scale_advantages, negative_weight=spec.negative_weight
            )
            out.append(RolloutGroup(prompt, tuple(rollouts), advantages, example.id))
        return out

    def _score_reference(self, micros: list[RolloutMicro]) -> None:
        with self.model.adapters_disabled():
            for micro in micros:
                micro.reference_logprobs = self._scored(micro)

    def _score_old(self, micros: list[RolloutMicro]) -> None:
        for micro in micros:
            micro.old_logprobs = self._scored(micro)

    def _scored(self, micro: RolloutMicro) -> mx.array:
        options = dict(temperature=self.spec.temperature or 1.0, tree=micro.tree)
        logprobs, _ = score(self.model, micro.pairs, **options, gradient=False)
        mx.eval(logprobs)
        return mx.stop_gradient(logprobs)

    def _metrics(self, drawn: list[RolloutGroup], kept: list[RolloutGroup], rounds: int) -> dict[str, float]:
        """Means over all rollouts drawn, in all processes."""
        rollouts = [r for g in drawn for r in g.rollouts]
        aware = [r for r in rollouts if r.policy_aware]
        plain = [r for r in rollouts if not r.policy_aware]
        sums: dict[str, tuple[float, float]] = {}

        def add(name: str, values: Sequence[float]) -> None:
            sums[name] = (float(np.sum(values)) if len(values) else 0.0, float(len(values)))

        add("reward", [r.reward for r in rollouts])
        add("reward_plain", [r.reward for r in plain])
        if self.spec.policy_aware:
            add("reward_policy_aware", [r.reward for r in aware])
        for kind in self.rewards.kinds:
            add(f"reward/{kind}", [r.rewards[kind] for r in plain])
        add("completion_length", [len(r.completion_ids) for r in rollouts])
        # a token's -log p estimates the entropy, in nats, of what it was drawn from
        add("entropy", -np.concatenate([r.sampled_logprobs for r in plain]) if plain else [])
        add("finished", [float(r.finished) for r in rollouts])
        add("groups_with_signal", [float(g.has_signal) for g in drawn])
        names = list(sums)
        joined = world.sum_numbers([x for n in names for x in sums[n]])
        out = {n: joined[2 * i] / joined[2 * i + 1] for i, n in enumerate(names) if joined[2 * i + 1]}
        out["refill_rounds"] = float(rounds - 1)
        out["groups_trained"] = world.sum_numbers([float(len(kept))])[0]
        return out


def _labelled_spec(spec):
    """The sft settings of the labelled rows that ``sft_coef`` mixes in."""
    return SimpleNamespace(
        stage="sft", batch_size=spec.sft_batch_size, accumulate=1, steps=spec.steps, epochs=None,
        document_fraction=spec.document_fraction, reasoning=spec.reasoning, max_tokens=spec.max_tokens,
        rehearsal=spec.rehearsal,
    )


def _normaliser(groups: list[RolloutGroup], spec) -> float:
    """What the summed loss is divided by: rows, tokens, or rows times the longest completion allowed."""
    rollouts = [r for g in groups for r in g.rollouts]
    if spec.aggregation == "sequence":
        return float(len(rollouts))
    if spec.aggregation == "token":
        return float(sum(len(r.completion_ids) for r in rollouts))
    return float(len(rollouts) * spec.max_completion_tokens)
