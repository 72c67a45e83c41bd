import pytest
import torch
from lola_cases import orthonormal_directions

from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.methods.lola.directions import Rotary, calibrated_directions, slow_directions

KV_HEADS, HEAD_SIZE, TOKENS = 2, 16, 500


@pytest.mark.parametrize(
    ("rotary", "dimensions"),
    [
        (Rotary(16), [7, 15, 6, 14]),
        (Rotary(16, is_interleaved=True), [14, 15, 12, 13]),
        (Rotary(14), [14, 15, 6, 13]),  # two dimensions that are not turned
        (Rotary(8), [8, 9, 10, 11]),
    ],
)
def test_slow_directions_are_the_dimensions_that_turn_least(rotary, dimensions):
    directions = slow_directions(3, 16, 4, rotary)
    assert torch.equal(directions.key, torch.eye(16)[dimensions].expand(3, -1, -1))
    assert torch.equal(directions.query, directions.key)


def test_they_turn_least_in_the_rope_that_models_use():
    table = RotaryTable.from_base(10000.0, 16, positions=2)
    vectors = torch.eye(16)
    turned = (table.rotate(vectors, 1) - vectors).norm(dim=-1)
    chosen = slow_directions(1, 16, 6, Rotary(16)).key[0] @ turned
    assert chosen.max() <= turned.sort().values[5] + 1e-6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Rotary(64)),
        ({"model_type": "llama", "rope_parameters": {"rope_theta": 1e6}}, Rotary(64)),
        ({"model_type": "phi", "partial_rotary_factor": 0.5}, Rotary(32)),
        ({"model_type": "glm4", "rope_parameters": {"partial_rotary_factor": 0.5}}, Rotary(32, is_interleaved=True)),
        ({"model_type": "gptj", "rotary_dim": 48}, Rotary(48, is_interleaved=True)),
    ],
)
def test_rotary_of_a_model(config, expected):
    assert Rotary.of(config, 64) == expected


def tokens(columns: int = HEAD_SIZE):
    """Queries and keys [KV, T, d] of other spectra, in a random subspace of so many dimensions; keys have a mean."""
    generator = torch.Generator().manual_seed(0)

    def draw(power: float) -> torch.Tensor:
        basis = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_SIZE, columns, generator=generator)).Q
        scale = torch.arange(1, columns + 1).float() ** -power
        return torch.randn(KV_HEADS, TOKENS, columns, generator=generator) * scale @ basis.mT

    return draw(0.5), draw(1.0) + torch.randn(KV_HEADS, 1, HEAD_SIZE, generator=generator)


def moments(query: torch.Tensor, key: torch.Tensor):
    return query.mT @ query / TOKENS, key.mT @ key / TOKENS, key.mean(1)


@pytest.mark.parametrize("columns", [HEAD_SIZE, 5])
def test_directions_of_all_ranks_give_the_scores(columns):
    query, key = tokens(columns)
    directions = calibrated_directions(*moments(query, key), rank=columns)
    centred = key - key.mean(1, keepdim=True)
    scores = (query @ directions.query.mT) @ (centred @ directions.key.mT).mT
    assert torch.allclose(scores, query @ centred.mT, atol=1e-3)


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_no_other_product_of_the_rank_is_nearer(rank):
    """The error over independent queries and keys, |G^1/2 (1 - Pq'Pk) S^1/2|, is that of the truncated SVD."""
    query, key = tokens()
    gram_query, gram_key, mean = moments(query, key)
    directions = calibrated_directions(gram_query, gram_key, mean, rank)
    centred = (key - mean[:, None]).double()

    def error(bilinear: torch.Tensor) -> float:
        product = query.double() @ (torch.eye(HEAD_SIZE) - bilinear).double() @ centred.mT
        return float(product.square().mean().sqrt())

    best = error(directions.query.mT @ directions.key)
    values = torch.linalg.svdvals(query.double() @ centred.mT)
    assert best == pytest.approx(float((values[:, rank:].square().sum() / (KV_HEADS * TOKENS**2)).sqrt()), rel=1e-3)
    other = orthonormal_directions(KV_HEADS, HEAD_SIZE, rank)
    assert best < error(other.query.mT @ other.key)
