import math
from dataclasses import replace

import pytest
import torch
from batches import Batch, make_batch, token_proxies

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.methods.lrqk.decode import attend_selection, decode_attention
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

CONFIG = LRQKSettings(rank=8, page_size=16, top_k=20, recent_tokens=5, sink_tokens=3)
LENGTHS = [1, 2, 3, 15, 16, 17, 33, 63, 100, 211]


def dense(batch: Batch, b: int) -> torch.Tensor:
    """Dense attention of request b: float64 [H, d]."""
    query = batch.query[b].double().unflatten(0, (batch.keys[b].shape[0], -1))
    weight = (query @ batch.keys[b].double().mT * batch.scale).softmax(-1)
    return (weight @ batch.values[b].double()).flatten(0, 1)


def decode(batch: Batch, config: LRQKSettings) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.full(batch.query.shape, torch.nan)
    rows = decode_attention(
        batch.query,
        batch.host,
        batch.factors,
        batch.block_table,
        batch.seq_lens,
        batch.scale,
        config,
        output,
    )
    return output, rows


@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("d", [32, 96])
def test_covering_everything_equals_dense(residual, group, d):
    """Up to float32 rounding of sums of 211 terms, whatever the factors say."""
    config = replace(CONFIG, top_k=211, residual=residual)
    batch = make_batch(LENGTHS, config, group=group, d=d)
    output, rows = decode(batch, config)
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(output[b].double(), dense(batch, b), rtol=1e-4, atol=1e-5)
        assert int(rows[b]) == 2 * length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pages(dtype):
    """Pages of 16 bits hold their numbers exactly, so that only the factors differ: they do not matter here."""
    config = replace(CONFIG, top_k=211)
    batch = make_batch(LENGTHS, config, dtype=dtype)
    output, _ = decode(batch, config)
    for b in range(len(LENGTHS)):
        torch.testing.assert_close(output[b].double(), dense(batch, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("residual", ["linear", "mean", "none"])
@pytest.mark.parametrize("top_k", [1, 20])
def test_output_is_the_formula(residual, top_k, factor_dtype):
    """(sum_S e^s v + sum_p R_p u_p) / (sum_S e^s + sum_p R_p), token by token in Python floats."""
    config = replace(CONFIG, top_k=top_k, residual=residual, factor_dtype=factor_dtype)
    batch = make_batch(LENGTHS, config)
    selection = select(batch.query, batch.factors, batch.block_table, batch.seq_lens, batch.scale, config)
    output, _ = decode(batch, config)
    for b, length in enumerate(LENGTHS):
        proxies = token_proxies(batch, b, config)
        estimates = token_values(batch, b) if residual == "linear" else None
        for h in range(batch.query.shape[1]):
            kv = h // 3
            attended = {row for row in selection.positions[b, kv].tolist() if row >= 0}
            numerator, denominator = torch.zeros(32, dtype=torch.float64), 0.0
            for n in range(length):
                if n in attended:
                    score = float(batch.query[b, h].double() @ batch.keys[b][kv, n].double()) * batch.scale
                    value = batch.values[b][kv, n].double()
                elif residual == "none":
                    continue
                else:
                    score = float(proxies[h, n])
                    start = n // 16 * 16
                    # The page holds its mean in bfloat16.
                    value = batch.values[b][kv, start : start + 16].mean(0).bfloat16().double()
                    if estimates is not None:
                        value = value + estimates[kv, n]
                numerator += math.exp(score) * value
                denominator += math.exp(score)
            # Where float32 and float64 means straddle a bfloat16 boundary they differ by 2^-8 of one page's mean.
            torch.testing.assert_close(output[b, h].double(), numerator / denominator, rtol=1e-3, atol=1e-3)


def test_residual_brings_the_output_closer_to_dense():
    errors = {}
    for residual in ("linear", "mean", "none"):
        config = replace(CONFIG, residual=residual)
        batch = make_batch([211] * 8, config)
        output, _ = decode(batch, config)
        errors[residual] = sum(float((output[b] - dense(batch, b)).norm()) for b in range(8))
    assert errors["mean"] < 0.8 * errors["none"]
    # Values are random here; what the fit explains is that 8 coordinates and a mean are many for 16 tokens.
    assert errors["linear"] < 0.95 * errors["mean"]


def token_values(batch: Batch, b: int) -> torch.Tensor:
    """What page.py's formula adds to the mean value of each token's page: float64 [KV, sealed tokens, d]."""
    factors, n = batch.factors, batch.factors.format.page_size
    pages = batch.block_table[b, : len(batch.values[b][0]) // n].long()
    leading = factors.key_factor(pages)[..., : factors.format.value_rank].double()
    centred = leading - factors.key_factor_mean[pages].double()[:, :, None]
    projection = factors.value_projection[pages].double() * factors.value_scale[pages].double()[..., None]
    return (centred @ projection).transpose(0, 1).flatten(1, 2)


def test_huge_scores_stay_finite():
    config = replace(CONFIG, top_k=8)
    batch = make_batch([211, 17], config)
    batch.query *= 1e4
    output, _ = decode(batch, config)
    assert bool(output.isfinite().all())


def test_gather_rows_reads_host_pages():
    batch = make_batch([33, 100], CONFIG)
    rows = torch.tensor([[[32, 0, 17, -1], [5, 16, 31, 15]], [[99, 64, 3, 0], [-1, -1, 80, 47]]], dtype=torch.int32)
    gathered = gather_rows(batch.host, batch.block_table, rows)
    assert gathered.shape == (2, 2, 4, 2, 32)
    for b in range(2):
        for kv in range(2):
            for i, row in enumerate(rows[b, kv].tolist()):
                if row >= 0:
                    assert torch.equal(gathered[b, kv, i, 0], batch.keys[b][kv, row])
                    assert torch.equal(gathered[b, kv, i, 1], batch.values[b][kv, row])


def test_unused_places_may_be_anywhere():
    """Rows in any order with -1 in between, over rows that hold NaN, give the same output."""
    batch = make_batch([40], CONFIG)
    rows = torch.arange(40).expand(1, 2, -1)
    plain = attend_selection(
        batch.query,
        gather_rows(batch.host, batch.block_table, rows),
        Selection(rows.int(), None),
        batch.factors,
        batch.block_table,
        batch.scale,
    )
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([rows, torch.full((1, 2, 10), -1)], -1)[..., order]
    rows_kv = gather_rows(batch.host, batch.block_table, padded)
    rows_kv[(padded < 0)] = torch.nan
    mixed = attend_selection(
        batch.query, rows_kv, Selection(padded.int(), None), batch.factors, batch.block_table, batch.scale
    )
    torch.testing.assert_close(mixed, plain)
    torch.testing.assert_close(plain[0].double(), dense(batch, 0), rtol=1e-4, atol=1e-5)
