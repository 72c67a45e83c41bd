"""What the benchmark of speculation says of answers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from speculation import summarize


def record(tokens, seconds, drafted=0.0, accepted=0.0, gap=1.0):
    return {
        "tokens": tokens,
        "gaps": [gap] * len(tokens),
        "seconds": seconds,
        "drafted": drafted,
        "accepted": accepted,
    }


def test_answers_acceptance_and_speed():
    plain = [record([1, 2, 3], 2.0), record([4, 5, 6], 3.0, gap=1e-6)]
    drafting = [record([1, 2, 3], 1.0, 10, 9), record([4, 7, 6], 3.0, 10, 1)]
    found = summarize(plain, drafting)
    assert (found.same, found.gaps) == (1, [1e-6])
    assert found.acceptance == pytest.approx(0.5)
    assert found.interval == pytest.approx((0.1, 0.9))
    assert found.speed == [2.0, 1.0]


def test_nothing_drafted():
    found = summarize([record([1], 1.0)] * 2, [record([1], 1.0)] * 2)
    assert found.acceptance == 0.0 and found.interval == (0.0, 0.0) and found.gaps == []
