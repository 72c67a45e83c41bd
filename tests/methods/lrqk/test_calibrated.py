"""Calibrated factors: the page format, what a page keeps of scores and values, and on what it depends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages import relative

from vllm_lrqk.core.moments import MomentSums, mean_moments
from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.evaluation.attention.decoding import (
    CalibratedLayer,
    calibrated_on_prompt,
    dense_decode,
    paged_decode,
    relative_error,
)
from vllm_lrqk.evaluation.attention.generator import SETS, generate
from vllm_lrqk.methods.lrqk.calibrated_basis import make_basis
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.calibrated_score import calibrated_scores
from vllm_lrqk.methods.lrqk.calibrated_seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

N, KV, G, D = 64, 2, 3, 32
ROPE = RotaryTable.from_base(1e4, D, 1024)


@pytest.mark.parametrize(
    ("page_format", "offsets", "bytes_per_token"),
    [
        (CalibratedFormat(256, 128), (4096, 6144, 6208, 6464, 6528, 8576), 34),
        (CalibratedFormat(256, 128, has_value_map=False), (4096, 6144, 6208, 6464, 6528, 8576), 26),
        (CalibratedFormat(256, 64), (4096, 6144, 6208, 6336, 6400, 7424), 30),
        (CalibratedFormat(64, 128, 8, 24), (512, 1280, 1344, 1600, 1664, 3712), 59),
    ],
)
def test_offsets_are_pinned(page_format, offsets, bytes_per_token):
    """Kernels rely on these; 256 * 16 = 4096 bytes of leading A, half as many of trailing A."""
    f = page_format
    found = (f.trailing_offset, f.projection_scale_offset, f.value_mean_offset, f.key_factor_mean_offset)
    assert (*found, f.value_projection_offset, f.value_scale_offset) == offsets
    assert f.bytes_per_token == bytes_per_token


@given(
    st.sampled_from([16, 32, 64, 256]),
    st.integers(1, 16).map(lambda n: 8 * n),
    st.integers(0, 6).map(lambda n: 4 * n),
    st.integers(1, 4).map(lambda n: 8 * n),
)
def test_what_is_written_is_read(page_size, head_size, leading, trailing):
    f = CalibratedFormat(page_size, head_size, leading, trailing)
    basis = basis_of(*request(64), 8)  # unused
    pages = CalibratedPages(torch.full((3, 2, f.page_bytes), 0xFF, dtype=torch.uint8), f, basis)
    generator = torch.Generator().manual_seed(page_size + head_size + leading + trailing)
    small = torch.randint(-8, 8, (2, 2, page_size, trailing), generator=generator)
    large = torch.randint(-128, 128, (2, 2, page_size, leading), generator=generator)
    key_factor, ids = torch.cat([large, small], -1).to(torch.int8), torch.tensor([2, 0])
    pages.write_key_factor(ids, key_factor)
    before = pages.raw.clone()
    for view in (pages.projection_scale, pages.value_mean, pages.key_factor_mean, pages.packed_value_projection):
        view[ids] = 0
    assert torch.equal(pages.key_factor(ids), key_factor)
    assert torch.equal(pages.key_factor(ids[None]), key_factor[None])
    assert (pages.raw[1] == 0xFF).all() and torch.equal(before[1], pages.raw[1])


def request(length=300, seed=0):
    """Queries [L, H, d], keys and values [L, KV, d] after RoPE; values follow keys in part."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, D, generator=generator) * torch.arange(1, 9)[:, None] ** -0.7
    position = torch.arange(length)[:, None]

    def vectors(heads):
        content = torch.randn(length, heads, 8, generator=generator) @ mixing
        return content + 0.1 * torch.randn(length, heads, D, generator=generator)

    key = vectors(KV)
    value = key @ torch.randn(D, D, generator=generator) * 0.2 + 0.05 * torch.randn(length, KV, D, generator=generator)
    return ROPE.rotate(2 * vectors(KV * G), position), ROPE.rotate(key, position), value


def moments_of(query, key, value):
    sums = MomentSums(KV, D, N, ROPE, torch.device("cpu"))
    sums.add(query, key, value, torch.arange(len(query)))
    return mean_moments([sums.sums()], KV)


def basis_of(query, key, value, rank):
    return make_basis(moments_of(query, key, value), rank, ROPE.every(N))


def sealed(key, value, basis, f, order=None):
    """Pages 0, 1, ... of a request, sealed in the order given; the rest of the host pages is NaN."""
    count = len(key) // N
    host = torch.full((count + 1, KV, N, 2, D), torch.nan)
    rows = torch.stack([key, value], 2)[: count * N].unflatten(0, (count, N)).transpose(1, 2)
    host[:count] = rows
    factors = CalibratedPages(torch.full((count + 1, KV, f.page_bytes), 0xFF, dtype=torch.uint8), f, basis)
    for pages in order or [list(range(count))]:
        ids = torch.tensor(pages)
        seal_pages(ids, ids, host, factors)
    return factors


@pytest.mark.parametrize(("leading", "trailing", "most"), [(24, 8, 0.01), (16, 16, 0.03), (8, 8, 0.25)])
def test_scores_are_those_of_the_keys(leading, trailing, most):
    query, key, value = request()
    basis = basis_of(query, key, value, leading + trailing)
    factors = sealed(key, value, basis, CalibratedFormat(N, D, leading, trailing))
    last = query[-2:]
    scores = calibrated_scores(last, factors, torch.tensor([[0, 1, 2, 3]] * 2), 0.5).flatten(2)
    exact = torch.einsum("bkgd,nkd->bkgn", last.unflatten(1, (KV, G)), key[: 4 * N]).flatten(1, 2) * 0.5
    assert relative(scores, exact) < most


@pytest.mark.parametrize("has_value_map", [True, False])
def test_values_follow_the_key_factors(has_value_map):
    query, key, value = request()
    basis = basis_of(query, key, value, 32)
    factors = sealed(key, value, basis, CalibratedFormat(N, D, 16, 16, has_value_map))
    pages = torch.arange(4)
    deviation = factors.key_factor(pages).float() - factors.key_factor_mean[pages][:, :, None].float()
    estimate = factors.value_mean[pages][:, :, None].float() + deviation @ factors.value_map(pages)
    exact = value[: 4 * N].unflatten(0, (4, N)).transpose(1, 2)
    centred = exact - exact.mean(2, keepdim=True)
    # Four bits of the map cost about 5 %; noise of the values is a few percent.
    assert float((estimate - exact).norm() / centred.norm()) < 0.15


def test_a_page_depends_on_its_tokens_alone():
    query, key, value = request()
    f, basis = CalibratedFormat(N, D), basis_of(query, key, value, 32)
    at_once, one_by_one = sealed(key, value, basis, f), sealed(key, value, basis, f, [[3], [0, 2], [1]])
    # Matrix products of other shapes may round otherwise: by a step of the stored integers, here and there.
    changed = (at_once.key_factor(torch.arange(4)) != one_by_one.key_factor(torch.arange(4))).float().mean()
    assert changed < 1e-3
    assert relative(at_once.projection_scale[:4].float(), one_by_one.projection_scale[:4].float()) < 1e-2


def test_frames_keep_up_with_positions_that_the_calibration_never_saw():
    """The same content 512 tokens later has the same factors, and scores with a query as far away are the same."""
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, KV * G, D, generator=generator), torch.randn(N, KV, D, generator=generator)
    basis = basis_of(*request(128), 32)
    found = []
    for shift in (0, 512):
        turned = ROPE.rotate(key, shift + torch.arange(N)[:, None])
        host = torch.stack([turned, turned], 2).transpose(0, 1)[None]
        f = CalibratedFormat(N, D)
        factors = CalibratedPages(torch.zeros(1, KV, f.page_bytes, dtype=torch.uint8), f, basis)
        seal_pages(torch.tensor([0]), torch.tensor([shift // N]), host, factors)
        table = torch.zeros(1, shift // N + 1, dtype=torch.int64)
        scores = calibrated_scores(ROPE.rotate(query, shift + 100), factors, table, 1.0)[:, :, -1]
        found.append((factors.key_factor(torch.tensor([0])).float(), scores))
    assert relative(found[1][0], found[0][0]) < 0.01
    assert relative(found[1][1], found[0][1]) < 0.01


def test_the_basis_is_the_best_of_its_rank_for_scores():
    """No other split of the metric's singular vectors does better: the error is what the left-out ones carry."""
    query, key, value = request()
    moments, eye = moments_of(query, key, value), torch.eye(D).double()
    metric, gram = 0.5 * _normal(moments.page_query) + 0.5 * eye, _normal(moments.page_key)
    for rank in (8, 16):
        basis = make_basis(moments, rank, ROPE.every(N))
        loss = eye - basis.query.double() @ basis.key.double().mT
        left_out = torch.linalg.svdvals(_root(metric) @ _root(gram))[:, rank:].square().sum(1)
        torch.testing.assert_close(_error(metric, loss, gram), left_out, rtol=1e-3, atol=1e-6)


def _normal(gram):
    return gram.double() / gram.double().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def _error(metric, loss, gram):
    """|M^1/2 loss L^1/2|^2 of each head."""
    return (_root(metric) @ loss @ _root(gram)).square().sum((-1, -2))


@pytest.mark.parametrize("has_value_map", [True, False])
def test_errors_are_below_those_of_page_local_factors(has_value_map):
    """Set s1, 24 steps, top_k 512: .0141 and .0153 when this was written, .0212 with 16 page-local columns."""
    spec = SETS["s1"]
    qkv = generate(spec)
    config = LRQKSettings(top_k=512)
    rotary = RotaryTable.from_base(spec.rope_base, spec.head_size, len(qkv.query) + 256)
    basis = calibrated_on_prompt(qkv, rotary, 32, 256, qkv.prompt_tokens)
    layer = CalibratedLayer(qkv, qkv.prompt_tokens + 24, config, basis, has_value_map)
    error = relative_error(paged_decode(qkv, 24, config, layer=layer)[0], dense_decode(qkv, 24)).mean()
    page_local = relative_error(paged_decode(qkv, 24, config)[0], dense_decode(qkv, 24)).mean()
    assert error < 0.018
    assert error < 0.8 * page_local
