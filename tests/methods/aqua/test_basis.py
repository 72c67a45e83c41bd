import torch
from aqua_cases import anisotropic, basis_of

from vllm_lrqk.methods.aqua.basis import make_basis


def vectors(tokens=400, kv_heads=2, group=3, d=32):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0]
    query, key = (anisotropic(tokens, h, d, generator=generator) @ rotation for h in (kv_heads * group, kv_heads))
    return query, key


def test_columns_are_the_right_singular_vectors_of_stacked_queries_and_keys():
    query, key = vectors()
    basis = basis_of(query, key, 32)
    for kv in range(2):
        stacked = torch.cat([query[:, 3 * kv : 3 * kv + 3].flatten(0, 1), key[:, kv]]).double()
        _, _, right = torch.linalg.svd(stacked, full_matrices=False)
        alignment = (right @ basis.projection[kv].double()).abs()
        # Signs are free; float32 storage costs 1e-7 per element.
        torch.testing.assert_close(alignment, torch.eye(32).double(), atol=1e-5, rtol=0)


def test_all_columns_keep_scores_and_leading_ones_are_those_of_the_whole():
    query, key = vectors()
    whole, part = basis_of(query, key, 32), basis_of(query, key, 12)
    projected = whole.project_query(query).unflatten(1, (2, 3)), (whole.project_key(key) + whole.offset)[:, :, None]
    exact = (query.unflatten(1, (2, 3)) * key[:, :, None]).sum(-1)
    torch.testing.assert_close((projected[0] * projected[1]).sum(-1), exact, atol=1e-4, rtol=1e-4)
    assert torch.equal(part.projection, whole.projection[..., :12])


def test_sigma_is_the_deviation_of_projected_keys_and_their_mean_is_zero():
    query, key = vectors()
    basis = basis_of(query, key + 3.0, 32)
    projected = basis.project_key(key + 3.0)
    torch.testing.assert_close(projected.mean(0), torch.zeros(2, 32), atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.sigma, projected.square().mean(0).sqrt(), rtol=1e-3, atol=0)


def test_a_head_without_keys_divides_by_no_zero():
    basis = make_basis(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8), 8)
    assert (basis.sigma > 0).all() and basis.projection.isfinite().all()
