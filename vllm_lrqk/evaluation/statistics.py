"""Paired differences and their confidence intervals."""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95


def mean_score(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return scores.mean(-1)


def perplexity(losses: np.ndarray) -> np.ndarray:
    """exp of the mean over the last axis; `losses` are means of -log p in nats."""
    return np.exp(losses.mean(-1))


def paired_interval(
    ours: Sequence[float],
    dense: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] = mean_score,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """statistic(ours) - statistic(dense) and its 95 % interval, from values of the same samples in the same order.

    A percentile bootstrap over samples (Efron 1979): pairs are drawn together. Where every pair of scores differs by
    the same d the bootstrap would claim certainty; for scores in 0..1 the interval is then what remains possible
    if the share of other pairs is at most u = 1 - 0.025 ** (1 / n), Clopper and Pearson's bound for none in n:
    [d - u (1 + d), d + u (1 - d)]. None for fewer than two samples.
    """
    first, second = np.asarray(ours, dtype=float), np.asarray(dense, dtype=float)
    if len(first) < 2:
        return None
    difference = float(statistic(first) - statistic(second))
    if statistic is mean_score and np.ptp(first - second) == 0:
        share = 1 - ((1 - CONFIDENCE) / 2) ** (1 / len(first))
        return difference, difference - share * (1 + difference), difference + share * (1 - difference)
    index = _resamples(len(first), seed)
    return difference, *_middle(statistic(first[index]) - statistic(second[index]))


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float] | None:
    """Mean of the samples' values and its 95 % interval, a percentile bootstrap. None for fewer than two samples."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=float)
    return float(array.mean()), *_middle(array[_resamples(len(array), seed)].mean(-1))


def _resamples(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(size, size=(RESAMPLES, size))


def _middle(resampled: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)
