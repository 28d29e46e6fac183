from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.documents import PolicyDocument
from mpi_mlx.recipe import RlStage
from mpi_mlx.stages import ahead
from mpi_mlx.stages.ahead import Ahead, steps_ahead
from mpi_mlx.stages.rl import RolloutSource

RULES = PolicyDocument.from_text("If there is a red cube reply yes. Otherwise reply no. " * 3, "rules")


def test_blocks_of_whole_steps_end_at_the_last():
    """3 prompts a step, blocks of 4 steps, 6 steps in all: 12 positions, then 6."""
    asked = []

    def draw(positions):
        asked.append(positions)
        return [[p] for p in positions]

    found = Ahead(draw, 3, 4, 6)
    for step in range(6):
        mine = [3 * step, 3 * step + 1, 3 * step + 2]
        assert found(mine, 3 * step) == [[p] for p in mine]
    assert asked == [list(range(12)), list(range(12, 18))]


def test_a_run_that_begins_within_a_block_draws_the_same_block():
    asked = []
    found = Ahead(lambda positions: asked.append(positions) or [[p] for p in positions], 2, 4, None)
    assert found([10, 11], 10) == [[10], [11]]
    assert asked == [list(range(8, 16))]


def test_each_of_two_processes_draws_its_own_positions():
    """4 positions a step of which this process has the odd ones."""
    asked = []
    found = Ahead(lambda positions: asked.append(positions) or [[p] for p in positions], 4, 2, None)
    assert found([1, 3], 0) == [[1], [3]] and found([5, 7], 4) == [[5], [7]]
    assert asked == [[1, 3, 5, 7]]


def test_rows_and_memory_bound_a_block():
    config = {"num_attention_heads": 8, "num_key_value_heads": 2}
    model = SimpleNamespace(config=config, num_layers=4, hidden_size=1024, dtype=mx.float32)
    assert steps_ahead(model, 32, 16) == ahead.MOST_ROWS // 32
    # a row of 1,024 tokens: 2 x 4 layers x 256 wide x 4 bytes x 1,024 = 8 MiB, so 32 rows fit
    assert steps_ahead(model, 16, 1024) == 2
    assert steps_ahead(model, 512, 1024) == 1


@pytest.mark.parametrize("start", [0, 1, 2])
def test_what_is_drawn_ahead_is_what_a_step_alone_would_draw(adapted, dataset, monkeypatch, start):
    """Also by a run that begins at another step."""

    def drawn(steps, begin):
        monkeypatch.setattr("mpi_mlx.stages.rl.steps_ahead", lambda *_: steps)
        spec = RlStage(
            stage="rl", steps=3, prompts=2, group_size=1, policy_aware=2, policy_aware_sampler="reference",
            max_completion_tokens=6, drop_constant=False,
        )

        class Rewards:
            kinds = ("given",)

            def __call__(self, texts, examples):
                return np.arange(len(texts), dtype=np.float32), {"given": np.zeros(len(texts))}

        source = RolloutSource(adapted(), dataset.rl, RULES, spec, Rewards(), 5)
        source.load_state({"cursor": begin * spec.prompts})
        batches = [source.batch(step) for step in range(begin, 3)]
        groups = [sorted((g for m in b.micros for g in m.groups), key=lambda g: g.identity) for b in batches]
        return [[r.completion_ids.tolist() for g in some for r in g.rollouts] for some in groups]

    assert drawn(3, start) == drawn(1, 0)[start:]
