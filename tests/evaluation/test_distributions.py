"""Kept distributions and divergences against torch's own, over the whole vocabulary."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lrqk.evaluation import distributions
from vllm_lrqk.evaluation.distributions import (
    KEPT,
    Distributions,
    create_divergences,
    take_divergences,
    write_divergence,
)
from vllm_lrqk.evaluation.errors import EvaluationError


def whole_divergence(dense, ours):
    p, q = dense.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def kept_divergence(folder, dense, ours, vocabulary):
    file = folder / "text-100-0.npy"
    Distributions.create(file, 1, vocabulary)
    Distributions(file).write(0, dense)
    return Distributions(file).divergence(0, ours)


@given(seed=st.integers(0, 1 << 30), size=st.integers(2, KEPT), spread=st.floats(0.01, 20), change=st.floats(0, 2))
@settings(deadline=None, max_examples=50)
def test_of_a_small_vocabulary_it_is_exact(tmp_path_factory, seed, size, spread, change):
    """Tolerance: log-probabilities of up to a hundred are kept in float32."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(size, generator=generator) * spread
    ours = dense + torch.randn(size, generator=generator) * change
    found = kept_divergence(tmp_path_factory.mktemp("kept"), dense, ours, size)
    assert found == pytest.approx(whole_divergence(dense, ours), rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_of_a_large_vocabulary_it_is_a_bound_from_below(tmp_path, spread):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(50_000, generator=generator) * spread
    ours = dense + torch.randn(50_000, generator=generator) * 0.1
    found, whole = kept_divergence(tmp_path, dense, ours, 50_000), whole_divergence(dense, ours)
    assert 0 < found <= whole
    if spread == 5:  # 99 % of the mass is on the kept tokens
        assert found == pytest.approx(whole, rel=0.05)


def test_equal_distributions_do_not_diverge(tmp_path):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 4
    assert kept_divergence(tmp_path, logits, logits + 3.0, 5000) == pytest.approx(0, abs=1e-6)


def test_a_missing_step_is_noticed(tmp_path):
    file = tmp_path / "text.npy"
    Distributions.create(file, 2, 10)
    Distributions(file).write(1, torch.zeros(10))
    with pytest.raises(EvaluationError, match=r"text\.npy is incomplete: delete it and run the evaluation again\."):
        Distributions(file, "r").check(file)
    Distributions(file).write(0, torch.zeros(10))
    Distributions(file, "r").check(file)


def test_divergences_are_taken_once(tmp_path):
    file = tmp_path / "new" / "divergences.npy"
    create_divergences(file, 2)
    write_divergence(file, 1, 0.5)
    write_divergence(file, 0, 0.25)
    assert take_divergences(file) == [0.25, 0.5] and not file.exists()
    create_divergences(file, 2)
    write_divergence(file, 1, 0.5)
    with pytest.raises(EvaluationError, match="is incomplete"):
        take_divergences(file)


def test_the_file_is_small(tmp_path):
    """As its documentation says: 8 bytes for each of the kept tokens of a step."""
    file = tmp_path / "text.npy"
    Distributions.create(file, 100, 200_000)
    assert file.stat().st_size == pytest.approx(100 * 8 * distributions.KEPT, rel=0.01)
    assert np.load(file).shape == (100,)
