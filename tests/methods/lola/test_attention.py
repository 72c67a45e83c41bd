"""What holds for every LoLA layer; the plain torch form is the one that is asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lola_cases import (
    GROUP,
    HEAD_SIZE,
    KV_HEADS,
    Tokens,
    causal_softmax,
    kept_positions,
    make_maps,
    make_memory,
    make_rules,
    make_tokens,
    run,
)

from vllm_lrqk.methods.lola.attention import decode_attention, prefill_attention
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import hedgehog_features

LENGTH = 300
# Float32 sums in another order.
ROUNDING = 2e-5
# The same, and a state that was folded in other pieces.
CUT_ROUNDING = 1e-4


def lola(**values) -> LolaSettings:
    return LolaSettings(**{"window": 16, "chunk": 16, "cache": 24, "sink_tokens": 0, "state_rank": 4} | values)


KINDS = {
    "slope": lola(),
    "sinks": lola(sink_tokens=4),
    "random": lola(select="random"),
    "none": lola(state="none"),
    "hedgehog": lola(state="hedgehog", feature_maps="file"),
}


@given(st.integers(1, 320))
@settings(max_examples=25, deadline=None)
def test_window_over_all_tokens_is_softmax(length):
    tokens = make_tokens(length)
    output, _ = run(make_rules(lola(window=304)), tokens)
    assert torch.allclose(output, causal_softmax(tokens), atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [63, 64, 65, 300])
def test_cache_over_all_tokens_is_softmax(kind, length):
    tokens = make_tokens(length)
    chosen = KINDS[kind]
    everything = LolaSettings(**{**vars(chosen), "cache": LENGTH})
    output, memory = run(make_rules(everything), tokens)
    assert torch.allclose(output, causal_softmax(tokens), atol=ROUNDING)
    assert everything.folded(everything.updates(length)) == 0
    kept = kept_positions(memory, length)
    assert torch.equal(kept, torch.arange(kept.shape[1]).int().expand_as(kept))


@pytest.mark.parametrize("with_kappa", [True, False])
def test_without_a_cache_hedgehog_is_lolcats(with_kappa):
    """LoLCATs as one masked matrix: softmax inside the terraced window, feature maps before it."""
    chunk, tokens, maps = 16, make_tokens(LENGTH), make_maps(with_kappa=with_kappa)
    rules = make_rules(lola(cache=0, state="hedgehog", feature_maps="file"), maps=maps)
    output, _ = run(rules, tokens)
    i = torch.arange(LENGTH)
    causal = i[None] <= i[:, None]
    window = causal & (i[None] >= ((i // chunk - 1) * chunk)[:, None])
    query = tokens.query.unflatten(1, (KV_HEADS, GROUP)).permute(1, 2, 0, 3)
    key, value = (x.transpose(0, 1)[:, None] for x in (tokens.key, tokens.value))
    scores = query @ key.mT * HEAD_SIZE**-0.5
    features = hedgehog_features(query, maps.query.unflatten(0, (KV_HEADS, GROUP)))
    linear = features @ hedgehog_features(key, maps.key[:, None]).mT
    if maps.kappa is not None:
        balance = (query @ maps.kappa.view(KV_HEADS, GROUP, -1, 1)) + maps.bias.view(KV_HEADS, GROUP, 1, 1)
    else:
        highest = scores.masked_fill(~window, -torch.inf).amax(-1, keepdim=True)
        balance = highest + maps.bias.view(KV_HEADS, GROUP, 1, 1)
    weight = torch.where(window, scores.exp(), linear * balance.exp()) * causal
    expected = (weight @ value / weight.sum(-1, keepdim=True)).permute(2, 0, 1, 3).flatten(1, 2)
    assert torch.allclose(output, expected, atol=CUT_ROUNDING)


@given(st.integers(1, 5000), st.sampled_from([16, 48]), st.sampled_from([16, 32]), st.integers(0, 100))
def test_every_token_is_in_one_place(length, window, chunk, cache):
    chosen = lola(window=window, chunk=chunk, cache=cache)
    updates = chosen.updates(length)
    in_ring = length - updates * chunk
    assert in_ring + chosen.cached(updates) + chosen.folded(updates) == length
    assert min(length, window) <= in_ring <= chosen.ring_rows
    assert chosen.updates(length + 1) - updates in (0, 1)


@pytest.mark.parametrize("length", [31, 32, 33, 299, 300])
def test_kept_positions_are_old_distinct_and_ascending(length):
    chosen = lola(cache=40)
    _, memory = run(make_rules(chosen), make_tokens(length))
    kept = kept_positions(memory, length)
    assert (kept.diff(dim=1) > 0).all()
    assert (kept < chosen.updates(length) * chosen.chunk).all()
    for head, positions in enumerate(kept):
        assert torch.equal(memory.cache[0, head, : len(positions), 0], make_tokens(length).key[positions.long(), head])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_cuts_do_not_matter(kind, data):
    length = data.draw(st.integers(1, LENGTH))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6))) if length > 1 else []
    decode_from = data.draw(st.sampled_from([None, *cuts]))
    tokens, rules = make_tokens(length), make_rules(KINDS[kind])
    whole, memory = run(rules, tokens)
    before = [cut for cut in cuts if decode_from is None or cut < decode_from]
    cut, cut_memory = run(rules, tokens, before, decode_from=decode_from)
    assert torch.allclose(whole, cut, atol=CUT_ROUNDING)
    assert torch.equal(kept_positions(memory, length), kept_positions(cut_memory, length))


@pytest.mark.parametrize("kind", KINDS)
def test_single_tokens_from_the_first_on(kind):
    tokens, rules = make_tokens(200), make_rules(KINDS[kind])
    whole, memory = run(rules, tokens)
    single, single_memory = run(rules, tokens, decode_from=0)
    assert torch.allclose(whole, single, atol=CUT_ROUNDING)
    assert torch.equal(kept_positions(memory, 200), kept_positions(single_memory, 200))


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_scores_stay_finite(kind):
    tokens = make_tokens(LENGTH)
    tokens.query *= 100
    output, _ = run(make_rules(KINDS[kind]), tokens)
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fill", [0xFF, 0x7F])
def test_a_block_taken_over_gives_the_same_as_a_fresh_one(kind, fill):
    """Whole memory of NaN (0xFF) or of large numbers (0x7F), then of another request."""
    rules = make_rules(KINDS[kind])
    memory = make_memory(rules.settings, fill=fill)
    first, _ = run(rules, make_tokens(90, seed=3), memory=memory)
    fresh, fresh_memory = run(rules, make_tokens(LENGTH, seed=4))
    second, _ = run(rules, make_tokens(LENGTH, seed=4), memory=memory)
    assert first.isfinite().all()
    assert torch.equal(second, fresh)
    assert torch.equal(kept_positions(memory, LENGTH), kept_positions(fresh_memory, LENGTH))


def test_batch_of_requests_at_other_lengths():
    """Each request of a batch gives what it gives alone; a request of length 0 gives zero and writes nothing."""
    lengths, rules = [1, 33, 0, 150], make_rules(lola(sink_tokens=2))
    memory = make_memory(rules.settings, blocks=6)
    blocks = torch.tensor([4, 0, 5, 2], dtype=torch.int32)
    expected, last = [], []
    for block, length in zip(blocks.tolist(), lengths):
        tokens = make_tokens(max(length, 1), seed=10 + length)
        last.append(tokens[-1:] if length else make_tokens(1))
        output, _ = run(rules, tokens)
        expected.append(output[-1] if length else torch.zeros_like(output[0]))
        if length > 1:
            run(rules, tokens[:-1], memory=memory, block=block)
    output = torch.full((4, KV_HEADS * GROUP, HEAD_SIZE), torch.nan)
    query, key, value = (torch.cat([getattr(part, name) for part in last]) for name in ("query", "key", "value"))
    lens = torch.tensor(lengths, dtype=torch.int32)
    decode_attention(query, key, value, memory, blocks, lens, rules, output)
    assert torch.allclose(output, torch.stack(expected), atol=CUT_ROUNDING)
    untouched = torch.tensor([1, 3, 5])
    assert (memory.raw[untouched] == 0xFF).all()


def test_state_per_query_head_with_equal_maps_is_the_shared_state():
    tokens, shared = make_tokens(LENGTH), make_maps()
    chosen = KINDS["hedgehog"]
    each = make_maps(per_query_head=True)
    each = type(each)(shared.query, shared.key.repeat_interleave(GROUP, 0), shared.bias, shared.kappa)
    expected, memory = run(make_rules(chosen, maps=shared), tokens)
    wide = make_memory(chosen, heads=KV_HEADS * GROUP)
    output, _ = run(make_rules(chosen, maps=each), tokens, memory=wide)
    assert torch.allclose(output, expected, atol=CUT_ROUNDING)
    assert torch.equal(kept_positions(wide, LENGTH), kept_positions(memory, LENGTH).repeat_interleave(GROUP, 0))


def test_sinks_never_leave():
    _, memory = run(make_rules(lola(sink_tokens=6, cache=12)), make_tokens(LENGTH))
    assert torch.equal(kept_positions(memory, LENGTH)[:, :6], torch.arange(6).int().expand(KV_HEADS, 6))


def test_equal_scores_keep_the_older():
    tokens = make_tokens(LENGTH)
    tokens.value[:] = 1.0
    _, memory = run(make_rules(lola(state="none")), tokens)
    assert torch.equal(kept_positions(memory, LENGTH), torch.arange(24).int().expand(KV_HEADS, 24))


def test_random_selection_is_spread_and_differs_by_head():
    _, memory = run(make_rules(lola(select="random", cache=64)), make_tokens(1000))
    kept = kept_positions(memory, 1000)
    left = LolaSettings(window=16, chunk=16).updates(1000) * 16
    # Of 64 positions, uniform below 976: a mean 4 standard deviations off, or a quarter without any, does not happen.
    assert ((kept.float().mean(1) / left - 0.5).abs() < 4 * (1 / 12 / 64) ** 0.5).all()
    assert not torch.equal(kept[0], kept[1])


def test_values_linear_in_the_key_are_recalled_and_the_exception_is_kept():
    generator = torch.Generator().manual_seed(2)
    tokens = make_tokens(LENGTH)
    linear = torch.randn(KV_HEADS, HEAD_SIZE, HEAD_SIZE, generator=generator) / HEAD_SIZE**0.5
    tokens.value = torch.einsum("tkd,kde->tke", tokens.key, linear) + 1.0
    tokens.value[77] += 5.0
    rules = make_rules(lola(state_rank=HEAD_SIZE, cache=8))
    _, memory = run(rules, tokens)
    assert (kept_positions(memory, LENGTH) == 77).any(1).all()
    chosen = rules.settings
    sums = {name: tensor[0] for name, tensor in memory.sums.items()}
    key, value = tokens.key[:64].transpose(0, 1), tokens.value[:64].transpose(0, 1)
    recalled = rules.state.recall(sums, key, chosen.folded(chosen.updates(LENGTH)))
    # The ridge draws the slope to zero by a few percent of values of size 1.
    assert (recalled - value).abs().mean() < 0.1


def test_one_pair_again_and_again_is_softmax():
    tokens = make_tokens(LENGTH)
    same = Tokens(tokens.query, tokens.key[:1].expand_as(tokens.key), tokens.value[:1].expand_as(tokens.value))
    output, _ = run(make_rules(lola(cache=0)), same)
    assert torch.allclose(output, causal_softmax(same), atol=CUT_ROUNDING)


def test_strided_arguments():
    rules, tokens = make_rules(lola()), make_tokens(100)
    expected, _ = run(rules, tokens)
    wide = torch.full((100, 3 * tokens.query.shape[1], HEAD_SIZE), torch.nan)
    wide[:, :4] = tokens.query
    memory = make_memory(rules.settings, blocks=2)
    output = torch.full_like(wide, torch.nan)
    prefill_attention(wide[:, :4], tokens.key, tokens.value, memory, 1, 0, rules, output[:, :4])
    assert torch.equal(output[:, :4], expected)
    assert output[:, 4:].isnan().all()
    assert (memory.raw[0] == 0xFF).all()
