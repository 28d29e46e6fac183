"""Intervals and baselines, by hand and against tables."""

import pytest

from mpi_mlx.evaluation.metrics import (
    Mean,
    bootstrap_interval,
    difference_variance,
    majority_share,
    mean_over_seeds,
    paired_difference,
    proportion_variance,
    same_text,
    t_quantile,
    wilson_interval,
)


def test_wilson_by_hand():
    # p = .8, n = 10, z^2 = 3.8415: centre (.8 + .19207) / 1.38415 = .71674,
    # reach 1.95996 * sqrt(.016 + .0096036) / 1.38415 = .22657
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_stays_inside_and_is_not_empty_at_the_ends():
    # at 0 of n the upper end is z^2 / (n + z^2)
    low, high = wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(3.8415 / 23.8415, abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0 and wilson_interval(20, 20)[0] == pytest.approx(1 - high)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mean_over_seeds_by_hand():
    # deviation .04; t(2) = 4.3027; reach 4.3027 * .04 / sqrt(3) = .09937
    found = mean_over_seeds([0.90, 0.94, 0.98])
    assert found.value == pytest.approx(0.94) and found.n == 3
    assert found.interval == pytest.approx((0.84063, 1.03937), abs=1e-5)
    assert str(found) == "0.940 [0.841, 1.039]"


def test_one_seed_has_no_interval():
    assert mean_over_seeds([0.5]) == Mean(0.5, None, 1)
    with pytest.raises(ValueError):
        mean_over_seeds([])


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (4, 2.7764), (30, 2.0423), (40, 2.0211), (120, 1.9799)]
)
def test_t_quantiles_are_the_tables(degrees, t):
    assert t_quantile(degrees) == pytest.approx(t, abs=2e-4)


def test_pairs_take_out_what_a_document_contributes():
    # differences .1, .2, .3 over documents as different as .2 and .9; t(2) * .1 / sqrt(3) = .24842
    with_it = {1: 0.3, 2: 0.7, 3: 1.0, 4: 0.5}
    without = {1: 0.2, 2: 0.5, 3: 0.7}
    found = paired_difference(with_it, without)
    assert found.value == pytest.approx(0.2) and found.n == 3
    assert found.interval == pytest.approx((-0.04842, 0.44842), abs=1e-5)


def test_a_share_varies_by_its_examples_even_at_the_ends():
    assert proportion_variance(1.0, 96) == pytest.approx(0.98 * 0.02 / 100)
    assert proportion_variance(0.5, 96) == pytest.approx(0.0025)


def test_a_difference_varies_less_on_the_same_examples():
    a = {n: n < 90 for n in range(98)}
    b = {n: n >= 6 for n in range(98)}  # 84 both, 6 a alone, 8 b alone
    # (6 + 8 + 1 - 2^2 / 100) / 100^2
    assert difference_variance((90 / 98, 98), (92 / 98, 98), a, b) == pytest.approx(14.96 / 1e4)
    assert difference_variance((1.0, 98), (1.0, 98), a, a) == pytest.approx(1e-4)  # alike: 1 / 100^2
    alone = proportion_variance(1.0, 98) + proportion_variance(0.5, 98)
    for other in (None, {n + 1: True for n in range(98)}):  # other examples
        assert difference_variance((1.0, 98), (0.5, 98), a, other) == alone


def test_means_are_no_surer_than_the_examples_behind_them():
    # two of 96, all right: .02 * .98 / 100 each, so 1.96 * sqrt(.000196 / 2) = .0194028
    sampling = [proportion_variance(1.0, 96)] * 2
    assert mean_over_seeds([1.0, 1.0], sampling).interval == pytest.approx((0.980597, 1.019403), abs=1e-6)
    # the same 96 examples both times: 1.96 * sqrt(.000196) = .0274395
    assert mean_over_seeds([1.0, 1.0], sampling, shared=True).interval[0] == pytest.approx(0.972561, abs=1e-6)
    wide = mean_over_seeds([0.90, 0.94, 0.98], [1e-4] * 3)  # the spread says more: as without
    assert wide == mean_over_seeds([0.90, 0.94, 0.98])
    assert paired_difference({1: 1.0, 2: 1.0}, {1: 0.9, 2: 0.9, 3: 0.1}, {1: 1e-4, 2: 3e-4}).interval == pytest.approx(
        (0.1 - 0.0196, 0.1 + 0.0196), abs=1e-5
    )


def test_bootstrap_of_ones_and_zeros_is_near_the_normal_interval():
    # sqrt(.25 / 400) = .025: +-.049
    low, high = bootstrap_interval([0, 1] * 200)
    assert low == pytest.approx(0.451, abs=0.006) and high == pytest.approx(0.549, abs=0.006)
    assert bootstrap_interval([0, 1] * 200) == (low, high)
    assert bootstrap_interval([0.25] * 5) == (0.25, 0.25)


def test_majority_and_texts():
    assert majority_share(["a", "A ", "b", "c"]) == 0.5
    assert majority_share([]) == 0.0
    assert same_text("a  b\nc", "a b c") and not same_text("a b", "ab")
