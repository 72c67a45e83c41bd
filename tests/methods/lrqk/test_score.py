import math
from dataclasses import replace

import pytest
import torch
from batches import Batch, make_batch, token_proxies

from vllm_lrqk.core.selection import Selection, candidate_range
from vllm_lrqk.methods.lrqk.score import proxy_scores, select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=20, recent_tokens=5, sink_tokens=3)
LENGTHS = [1, 2, 3, 7, 15, 16, 17, 21, 31, 33, 48, 63, 100, 211]
CONFIGS = {
    "plain": CONFIG,
    "no-sinks": replace(CONFIG, sink_tokens=0),
    "recent-longer-than-page": replace(CONFIG, recent_tokens=37),
    "recent-one": replace(CONFIG, recent_tokens=1),
    "top-one": replace(CONFIG, top_k=1),
    "top-k-beyond-context": replace(CONFIG, top_k=1000),
    "sinks-beyond-page": replace(CONFIG, sink_tokens=20),
    "sinks-beyond-context": replace(CONFIG, sink_tokens=300),
    "bfloat16": replace(CONFIG, factor_dtype="bfloat16"),
    "no-residual": replace(CONFIG, residual="none"),
}


def run(batch: Batch, config: LRQKSettings) -> Selection:
    return select(batch.query, batch.factors, batch.block_table, batch.seq_lens, batch.scale, config)


def candidates_of(length: int, config: LRQKSettings) -> set[int]:
    """Sealed tokens that are neither sink nor recent; the page that the last token fills is not sealed yet."""
    sealed = range((length - 1) // config.page_size * config.page_size)
    return {n for n in sealed if n >= config.sink_tokens and n < length - config.recent_tokens}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    batch = make_batch(LENGTHS, config)
    return batch, config, run(batch, config)


def attended(selection: Selection, b: int, kv: int) -> list[int]:
    return [row for row in selection.positions[b, kv].tolist() if row >= 0]


def test_rows_are_the_best_candidates_and_all_others(case):
    """Per request and KV head, in float64; where float32 could order two weights differently either may win."""
    batch, config, selection = case
    kv_heads, group = 2, 3
    for b, length in enumerate(LENGTHS):
        candidates = sorted(candidates_of(length, config))
        scores = token_proxies(batch, b, config)
        for kv in range(kv_heads):
            rows = set(attended(selection, b, kv))
            always = set(range(length)) - set(candidates)
            assert always <= rows <= set(range(length))
            chosen = rows - always
            assert len(chosen) == min(config.top_k, len(candidates))
            if len(chosen) == len(candidates):
                continue
            weight = torch.stack([scores[kv * group + g, candidates].softmax(0) for g in range(group)]).sum(0)
            by_token = dict(zip(candidates, weight.tolist()))
            worst_chosen = min(by_token[n] for n in chosen)
            best_left = max(by_token[n] for n in candidates if n not in chosen)
            assert worst_chosen >= best_left * (1 - 1e-5)


def test_no_row_twice(case):
    _, _, selection = case
    for b in range(len(LENGTHS)):
        for kv in range(2):
            rows = attended(selection, b, kv)
            assert len(rows) == len(set(rows))


def test_no_more_rows_than_configured(case):
    _, config, selection = case
    assert int((selection.positions >= 0).sum(-1).max()) <= config.attended_rows
    assert selection.positions.dtype == torch.int32


def test_residual_sums_the_unattended_candidates(case):
    batch, config, selection = case
    if config.residual == "none":
        assert selection.residual is None
        return
    for b, length in enumerate(LENGTHS):
        scores = token_proxies(batch, b, config)
        for h in range(batch.query.shape[1]):
            left = candidates_of(length, config) - set(attended(selection, b, h // 3))
            if selection.residual is None:
                assert not left
                continue
            for p in range(selection.residual.shape[-1]):
                in_page = [n for n in left if n // config.page_size == p]
                expected = math.log(sum(math.exp(scores[h, n]) for n in in_page)) if in_page else -math.inf
                assert float(selection.residual[b, h, p]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("more", [-44, -1, 0, 1])
@pytest.mark.parametrize(("length", "num_candidates"), [(63, 45), (64, 45), (65, 57)])
def test_lengths_around_the_budget(length, num_candidates, more):
    """top_k one below, at and above the candidates: 48 sealed tokens less 3 sinks, then 64 less 3 and 4 recent."""
    config = replace(CONFIG, top_k=num_candidates + more)
    selection = run(make_batch([length], config), config)
    assert len(candidates_of(length, config)) == num_candidates
    rows = attended(selection, 0, 0)
    assert len(rows) == len(set(rows)) == length + min(more, 0)


def test_request_alone_equals_request_in_batch():
    batch = make_batch(LENGTHS, CONFIG)
    together = run(batch, CONFIG)
    for b in range(len(LENGTHS)):
        alone = select(
            batch.query[b : b + 1],
            batch.factors,
            batch.block_table[b : b + 1],
            batch.seq_lens[b : b + 1],
            batch.scale,
            CONFIG,
        )
        for kv in range(2):
            assert set(attended(alone, 0, kv)) == set(attended(together, b, kv))


def test_one_head_cannot_crowd_out_another():
    """Softmax weights count, not raw scores: a head with ten times larger scores takes no more than its share."""
    config = replace(CONFIG, top_k=8)
    batch = make_batch([211], config, kv_heads=1, group=2)
    batch.query[0, 0] *= 10
    scores = token_proxies(batch, 0, config)
    candidates = sorted(candidates_of(211, config))
    quiet = [candidates[i] for i in scores[1, candidates].topk(2).indices.tolist()]
    assert set(quiet) <= set(attended(run(batch, config), 0, 0))


def test_proxy_scores_of_sealed_tokens():
    batch = make_batch([211, 100], CONFIG)
    scores = proxy_scores(batch.query, batch.factors, batch.block_table, batch.scale).flatten(2)
    for b, length in enumerate((211, 100)):
        sealed = length // 16 * 16
        # Float32 sums of 8 terms whose int8 factors reach 127.
        torch.testing.assert_close(
            scores[b, :, :sealed].double(), token_proxies(batch, b, CONFIG), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("length", "end"),
    [(1, 0), (5, 0), (16, 0), (17, 12), (20, 15), (21, 16), (22, 16), (31, 16), (32, 16), (33, 28), (40, 32)],
)
def test_candidates_end_at_sealed_and_before_recent(length, end):
    first, ends = candidate_range(torch.tensor([length]), CONFIG)
    assert (first, ends.tolist()) == (3, [end])
