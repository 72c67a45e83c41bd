"""The states against the formulas they stand for, in float64 over all folded tokens at once."""

import pytest
import torch
from lola_cases import GROUP, HEAD_SIZE, KV_HEADS, make_maps, make_memory, make_tokens, orthonormal_directions

from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import HedgehogState, SlopeState

SCALE = HEAD_SIZE**-0.5
RANK = 4


def folded_state(state, settings, key, value, pieces):
    """Sums after folding key, value [K, N, d] piece by piece into memory full of NaN."""
    memory = make_memory(settings, dtype=torch.float32)
    sums = {name: tensor[0] for name, tensor in memory.sums.items()}
    done = 0
    for piece in pieces:
        state.fold(sums, key[:, done : done + piece], value[:, done : done + piece], done)
        done += piece
    assert done == key.shape[1]
    return sums


@pytest.mark.parametrize("pieces", [[64], [1, 63], [20, 7, 1, 36], [1] * 64])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_slope_moments(pieces, offset):
    """Also with a mean that is thirty times the deviation, where sums of squares would lose four digits."""
    tokens = make_tokens(64)
    key, value = (tokens.key + offset).transpose(0, 1), tokens.value.transpose(0, 1)
    directions = orthonormal_directions(KV_HEADS, HEAD_SIZE, RANK)
    state = SlopeState(directions, SCALE)
    sums = folded_state(state, LolaSettings(state_rank=RANK), key, value, pieces)
    k, v = key.double(), value.double()
    z = (k - k.mean(1, keepdim=True)) @ directions.key.double().mT
    dv = v - v.mean(1, keepdim=True)
    expected = {
        "key_mean": k.mean(1),
        "value_mean": v.mean(1),
        "cross_moment": z.mT @ dv,
        "second_moment": z.mT @ z,
    }
    for name, tensor in expected.items():
        error = (sums[name].double() - tensor).norm() / tensor.norm()
        assert error < 2e-5, name
    query = tokens.query[:3].unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
    log_mass, mean = state.read(sums, query, 64, torch.zeros(query.shape[:-1]))
    x = query.double() * SCALE
    expected_mass = torch.tensor(64.0).double().log() + (x @ k.mean(1)[:, None, :, None])[..., 0]
    slope = (z.mT @ dv / 64)[:, None]
    expected_mean = v.mean(1)[:, None, None] + x @ directions.query.double()[:, None].mT @ slope
    assert torch.allclose(log_mass.double(), expected_mass, atol=1e-4)
    assert torch.allclose(mean.double(), expected_mean, atol=1e-4)


def test_slope_recall_is_ridge_regression():
    tokens = make_tokens(100)
    key, value = tokens.key.transpose(0, 1), tokens.value.transpose(0, 1)
    directions = orthonormal_directions(KV_HEADS, HEAD_SIZE, RANK)
    state = SlopeState(directions, SCALE)
    sums = folded_state(state, LolaSettings(state_rank=RANK), key, value, [100])
    k, v = key.double(), value.double()
    z = (k - k.mean(1, keepdim=True)) @ directions.key.double().mT
    second = z.mT @ z / 100
    ridge = 0.05 * second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(RANK)
    expected = v.mean(1, keepdim=True) + z @ torch.linalg.inv(second + ridge) @ (z.mT @ v / 100)
    assert torch.allclose(state.recall(sums, key, 100).double(), expected, atol=1e-5)


def test_one_folded_pair_recalls_its_value():
    tokens = make_tokens(1)
    key, value = tokens.key.transpose(0, 1), tokens.value.transpose(0, 1)
    maps = make_maps()
    hedgehog = LolaSettings(state="hedgehog", feature_maps="file")
    slope = SlopeState(orthonormal_directions(KV_HEADS, HEAD_SIZE, RANK), SCALE)
    for state, settings in ((HedgehogState(maps), hedgehog), (slope, LolaSettings(state_rank=RANK))):
        sums = folded_state(state, settings, key, value, [1])
        assert torch.allclose(state.recall(sums, key, 1), value, atol=1e-5)


def test_equal_keys_are_read_exactly():
    """All weights are equal then: the mass is n exp(q.k c), the value the mean of the values."""
    tokens = make_tokens(50)
    key = tokens.key[:1].expand(50, -1, -1).transpose(0, 1)
    value = tokens.value.transpose(0, 1)
    state = SlopeState(orthonormal_directions(KV_HEADS, HEAD_SIZE, RANK), SCALE)
    sums = folded_state(state, LolaSettings(state_rank=RANK), key, value, [30, 20])
    query = tokens.query.unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
    log_mass, mean = state.read(sums, query, 50, torch.zeros(query.shape[:-1]))
    scores = query @ key[:, None].mT * SCALE
    assert torch.allclose(log_mass, scores.logsumexp(-1), atol=1e-4)
    assert torch.allclose(mean, value.mean(1)[:, None, None].expand_as(mean), atol=1e-4)
