import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lrqk.evaluation.statistics import mean_interval, paired_interval, perplexity


def test_pairs_are_drawn_together():
    """Scores that vary much, with a difference that hardly does: unpaired intervals would be wide."""
    rng = np.random.default_rng(0)
    dense = rng.uniform(0, 1, 50)
    ours = dense - 0.1 + rng.normal(0, 0.001, 50)
    difference, low, high = paired_interval(ours, dense)
    assert difference == pytest.approx(-0.1, abs=0.001)
    assert low < difference < high
    assert high - low < 0.002


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        dense, ours = rng.binomial(1, 0.8, 60), rng.binomial(1, 0.6, 60)
        _, low, high = paired_interval(ours, dense)
        covered += low <= -0.2 <= high
    # 95 % of 200 are 190; below 180 or above 199 lies less than one case in a thousand.
    assert 180 <= covered <= 199


def test_equal_scores_are_not_certain():
    difference, low, high = paired_interval([1.0] * 10, [1.0] * 10)
    assert difference == 0
    assert high == -low == pytest.approx(1 - 0.025**0.1)
    assert paired_interval([0.0] * 10, [1.0] * 10)[:2] == (-1, -1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
@settings(deadline=None)
def test_an_interval_holds_its_difference(pairs):
    difference, low, high = paired_interval(*zip(*pairs))
    assert low - 1e-9 <= difference <= high + 1e-9  # rounding of means of up to 30 numbers
    assert low >= -1 - 1e-9 and high <= 1 + 1e-9


def test_perplexity_and_single_samples():
    difference, low, high = paired_interval([1.0, 2.0, 3.0], [0.0, 1.0, 2.0], perplexity)
    assert difference == pytest.approx(np.exp(2) - np.exp(1))
    assert low < difference < high
    assert paired_interval([1.0], [0.0]) is None


def test_mean_and_its_interval():
    values = np.random.default_rng(0).normal(3, 1, 100)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    # 1.96 standard errors, of which a percentile bootstrap is off by a few per cent
    error = values.std() / 10
    assert (mean - low, high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    assert mean_interval([1.0]) is None
