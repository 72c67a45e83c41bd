import pytest
import torch

from vllm_lrqk.methods.lola.directions import calibrated_directions, random_directions

KV_HEADS, HEAD_SIZE, TOKENS = 2, 16, 500


@pytest.mark.parametrize(("head_size", "rank"), [(64, 16), (96, 4), (128, 128)])
def test_random_directions_are_orthonormal_and_the_same_for_every_head(head_size, rank):
    directions = random_directions(3, head_size, rank)
    assert directions.key.shape == (3, rank, head_size)
    assert torch.allclose(directions.key @ directions.key.mT, torch.eye(rank).expand(3, -1, -1), atol=1e-6)
    assert torch.equal(directions.query, directions.key)
    assert torch.equal(directions.key[0], directions.key[2])


def test_random_directions_leave_torch_s_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = random_directions(1, 64, 16)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert torch.equal(random_directions(1, 64, 16).key, first.key)


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
    random = random_directions(KV_HEADS, HEAD_SIZE, rank)
    assert best < error(random.query.mT @ random.key)
