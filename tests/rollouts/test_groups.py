import numpy as np
import pytest

from mpi_mlx.rollouts.groups import Rollout, RolloutGroup, compute_advantages, overlong_penalty


def test_advantages_by_hand():
    """Four plain and two policy-aware completions: mean 1/2, sample deviation sqrt(6/4/5) over the union."""
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    found = compute_advantages(np.array(rewards))
    size = 0.5 / (0.3**0.5 + 1e-4)
    np.testing.assert_allclose(found, [size, -size, -size, -size, size, size], rtol=1e-6)
    assert found.dtype == np.float32
    apart = compute_advantages(np.array(rewards[:4]))
    assert apart[0] == pytest.approx(0.75 / (0.5 + 1e-4))  # what the plain half alone would give
    np.testing.assert_allclose(compute_advantages(np.array(rewards), scale=False), np.array(rewards) - 0.5)


def test_negative_advantages_are_weighed_and_those_of_no_weight_left_out():
    found = compute_advantages(np.array([1.0, 0.0, 0.0, 0.0]), scale=False, negative_weight=0.5)
    np.testing.assert_allclose(found, [0.75, -0.125, -0.125, -0.125])
    none = compute_advantages(np.array([1.0, 0.0, 0.6, 0.0]), scale=False, negative_weight=0.0)
    np.testing.assert_allclose(none, [0.6, 0.0, 0.2, 0.0], atol=1e-7)
    rollouts = tuple(Rollout(np.zeros(1), np.zeros(1), str(n), 0.0, False, True) for n in range(4))
    kept = RolloutGroup("prompt", rollouts, none, "a").weighted()
    assert [r.text for r in kept.rollouts] == ["0", "2"] and (kept.prompt, kept.identity) == ("prompt", "a")
    np.testing.assert_allclose(kept.advantages, [0.6, 0.2], atol=1e-7)


def test_constant_and_lonely_rewards_give_no_advantage():
    np.testing.assert_allclose(compute_advantages(np.array([0.7, 0.7, 0.7])), 0, atol=1e-9)
    assert compute_advantages(np.array([3.0])).tolist() == [0]


def group(*rewards):
    rollouts = tuple(Rollout(np.zeros(1), np.zeros(1), "", r, False, True) for r in rewards)
    return RolloutGroup(None, rollouts, compute_advantages(np.array(rewards)))


def test_signal():
    assert group(0.0, 0.0, 0.1).has_signal
    assert not group(0.3, 0.3).has_signal and not group(0.1 + 0.2, 0.3).has_signal


@pytest.mark.parametrize(
    "length, penalty", [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_overlong_penalty_by_hand(length, penalty):
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert overlong_penalty(length, 100, 0) == 0.0  # switched off
