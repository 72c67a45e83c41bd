"""Running sums against the sums written out token by token in float64."""

import pytest
import torch

from vllm_lrqk.core.moments import MomentSums, mean_moments
from vllm_lrqk.core.rotary import RotaryTable

N, H, KV, D = 16, 6, 2, 24
ROPE = RotaryTable.from_base(1e4, 16, 512)


def tokens(count=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, heads, D, generator=generator) for heads in (H, KV, KV)]


def summed(query, key, value, cuts, rotary=ROPE):
    sums = MomentSums(KV, D, N, rotary, torch.device("cpu"))
    for start, end in zip([0, *cuts], [*cuts, len(query)]):
        sums.add(query[start:end], key[start:end], value[start:end], torch.arange(start, end))
    return sums


def outer(left, right):
    """[KV, d, d] of [KV, n, d] each."""
    return left.double().mT @ right.double()


def test_sums_are_those_of_single_tokens():
    query, key, value = tokens()
    moments = mean_moments([summed(query, key, value, []).sums()], KV)
    grouped = query.unflatten(1, (KV, -1))
    assert_close(moments.query, sum(outer(grouped[i], grouped[i]) for i in range(70)) / 70)
    assert_close(moments.key, outer(key.transpose(0, 1), key.transpose(0, 1)) / 70)
    assert_close(moments.key_mean, key.double().mean(0))
    of_queries, weight = torch.zeros(KV, D, D).double(), 0
    for i in range(70):
        for page in range(i // N + 1):
            framed = ROPE.rotate(grouped[i], page * N, backwards=True)
            of_queries, weight = of_queries + outer(framed, framed), weight + 1
    assert_close(moments.page_query, of_queries / weight)
    framed = ROPE.rotate(key.transpose(0, 1), torch.arange(70) // N * N, backwards=True)
    assert_close(moments.page_key, outer(framed, framed) / 70)
    of_keys, of_values = torch.zeros(KV, D, D).double(), torch.zeros(KV, D, D).double()
    for page in range(4):  # the last tokens fill no page
        k, v = framed[:, page * N : (page + 1) * N], value.transpose(0, 1)[:, page * N : (page + 1) * N]
        k, v = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
        of_keys, of_values = of_keys + outer(k, k), of_values + outer(v, k)
    assert_close(moments.page_key_deviation, of_keys / 64)
    assert_close(moments.page_value_key, of_values / 64)


def assert_close(ours, exact):
    # Products and rotations are float32.
    torch.testing.assert_close(ours.double(), exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1], [16, 32], [7, 40, 41]])
def test_steps_may_cut_the_text_anywhere_but_for_what_needs_whole_pages(cuts):
    whole, parts = (mean_moments([summed(*tokens(), c).sums()], KV) for c in ([], cuts))
    for name in ("query", "key", "page_query", "page_key"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-4)
    if cuts == [16, 32]:
        torch.testing.assert_close(parts.page_value_key, whole.page_value_key, atol=1e-5, rtol=1e-4)


def test_requests_of_one_step_are_told_apart_by_their_positions():
    first, second = tokens(40, 1), tokens(33, 2)
    apart = MomentSums(KV, D, N, ROPE, torch.device("cpu"))
    for part in (first, second):
        apart.add(*part, torch.arange(len(part[0])))
    together = MomentSums(KV, D, N, ROPE, torch.device("cpu"))
    positions = torch.cat([torch.arange(40), torch.arange(33)])
    together.add(*(torch.cat(pair) for pair in zip(first, second)), positions)
    for ours, theirs in zip(
        vars(mean_moments([together.sums()], KV)).values(), vars(mean_moments([apart.sums()], KV)).values()
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_many_earlier_pages_are_sampled_but_weigh_as_much():
    query, key, value = tokens(480)
    sums = summed(query, key, value, [])
    total = float(sums.sums()["page_query"][0].diagonal(dim1=-2, dim2=-1).sum())
    # A rotation keeps lengths: the trace counts each query once per page before it.
    expected = sum(float(query[i].double().square().sum()) * (i // N + 1) for i in range(480))
    assert total == pytest.approx(expected, rel=1e-4)


def test_without_a_rotation_there_are_no_page_frames():
    moments = mean_moments([summed(*tokens(), [], rotary=None).sums()], KV)
    assert moments.page_key.abs().sum() == 0 and moments.key.abs().sum() > 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_up_the_whole(ranks):
    """Each rank has a share of the query heads, and KV heads of its own or one that it shares with a neighbour."""
    query, key, value = tokens()
    query = torch.cat([query, query[:, :2]], 1)  # 8 query heads
    whole = mean_moments([summed(query, key, value, []).sums()], KV)
    parts = []
    for rank in range(ranks):
        of_query = query.chunk(ranks, 1)[rank]
        kv = slice(rank * KV // ranks, rank * KV // ranks + 1)
        sums = MomentSums(1, D, N, ROPE, torch.device("cpu"))
        sums.add(of_query, key[:, kv], value[:, kv], torch.arange(70))
        parts.append(sums.sums())
    for ours, theirs in zip(vars(mean_moments(parts, KV)).values(), vars(whole).values()):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
