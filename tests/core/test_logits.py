"""Soft caps and sinks in the plain torch forms, against dense attention in float64."""

from dataclasses import replace

import pytest
import torch
from batches import Batch, make_batch

from vllm_lrqk.core.logits import Logits
from vllm_lrqk.core.prefill import prefill_attention
from vllm_lrqk.core.window_attention import window_attention, window_decode
from vllm_lrqk.methods.lrqk.decode import decode_attention
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

PAGE, KV_HEADS, GROUP, D = 16, 2, 3, 32
SINKS = torch.tensor([-2.0, 0.0, 1.0, 3.0, 5.0, 8.0])
CASES = [Logits(2.0), Logits(0.0, SINKS), Logits(20.0, SINKS)]
SETTINGS = LRQKSettings(rank=8, page_size=PAGE, top_k=250, recent_tokens=5, sink_tokens=3)


def dense(scores: torch.Tensor, value: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Attention of float64 scores [H, T, S], masked with -inf, over values [H, S, d]: [T, H, d]."""
    if logits.cap:
        scores = torch.where(scores.isinf(), scores, logits.cap * (scores / logits.cap).tanh())
    weight = scores.exp()
    total = weight.sum(-1)
    if logits.sinks is not None:
        total = total + logits.sinks.double().exp()[:, None]
    return ((weight / total[..., None]) @ value).transpose(0, 1)


def make_prompt(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, H, d] of all tokens, rows [T, KV, 2, d], the pages that hold them, and the pages' order."""
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(length, KV_HEADS * GROUP, D, generator=generator) * 2
    rows = torch.randn(length, KV_HEADS, 2, D, generator=generator)
    count = -(-length // PAGE)
    pages = torch.randperm(count, generator=generator)
    host = torch.full((count, KV_HEADS, PAGE, 2, D), torch.nan)
    at = torch.arange(length)
    host[pages[at // PAGE], :, at % PAGE] = rows
    return query, rows, host, pages.int()


def causal(query: torch.Tensor, rows: torch.Tensor, window: int, logits: Logits) -> torch.Tensor:
    """float64 [T, H, d], of every token."""
    key, value = rows.double().transpose(0, 1).repeat_interleave(GROUP, 0).unbind(2)
    scores = query.double().transpose(0, 1) @ key.mT * D**-0.5
    age = torch.arange(len(query))[:, None] - torch.arange(len(query))
    return dense(scores.masked_fill((age < 0) | (age >= window), -torch.inf), value, logits)


@pytest.mark.parametrize("logits", CASES)
@pytest.mark.parametrize("start", [0, 40, 99])
def test_prefill(logits: Logits, start: int) -> None:
    query, rows, host, pages = make_prompt(100)
    own, output = rows[start:], torch.full_like(query[start:], torch.nan)
    prefill_attention(query[start:], own[:, :, 0], own[:, :, 1], host, pages, start, D**-0.5, output, logits)
    # Float32 sums of 100 terms.
    torch.testing.assert_close(output.double(), causal(query, rows, 100, logits)[start:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("logits", CASES)
@pytest.mark.parametrize("window", [1, 20, 200])
def test_windows(logits: Logits, window: int) -> None:
    query, rows, host, pages = make_prompt(100)
    expected, place = causal(query, rows, window, logits), (window, D**-0.5)
    output = torch.full_like(query[40:], torch.nan)
    window_attention(query[40:], host, pages, 40, *place, output, logits)
    torch.testing.assert_close(output.double(), expected[40:], rtol=1e-5, atol=1e-5)
    last = torch.full_like(query[:2], torch.nan)
    table, lens = torch.stack([pages, pages]), torch.tensor([100, 0])
    window_decode(query[[99, 0]], host, table, lens, *place, last, logits)
    torch.testing.assert_close(last[0].double(), expected[99], rtol=1e-5, atol=1e-5)
    assert (last[1] == 0).all()


def decode(batch: Batch, config: LRQKSettings, logits: Logits) -> torch.Tensor:
    output = torch.full(batch.query.shape, torch.nan)
    pages = batch.host, batch.factors, batch.block_table, batch.seq_lens
    decode_attention(batch.query, *pages, batch.scale, config, output, logits)
    return output


def dense_decode(batch: Batch, b: int, logits: Logits) -> torch.Tensor:
    key, value = (x[b].double().repeat_interleave(GROUP, 0) for x in (batch.keys, batch.values))
    return dense(batch.query[b].double()[:, None] @ key.mT * batch.scale, value, logits)[0]


@pytest.mark.parametrize("logits", CASES)
def test_covering_everything_equals_dense(logits: Logits) -> None:
    lengths = [1, 16, 63, 211]
    batch = make_batch(lengths, SETTINGS)
    output = decode(batch, SETTINGS, logits)
    for b in range(len(lengths)):
        torch.testing.assert_close(output[b].double(), dense_decode(batch, b, logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits", CASES)
def test_the_residual_follows_them(logits: Logits) -> None:
    """Where factors are as wide as keys, most tokens may be residual; with caps and sinks forgotten it is far off."""
    config = replace(SETTINGS, top_k=20, rank=32, factor_dtype="bfloat16")
    batch = make_batch([211] * 4, config)
    output = decode(batch, config, logits)
    expected = torch.stack([dense_decode(batch, b, logits) for b in range(4)])
    forgotten = decode(batch, config, Logits())
    error = (output - expected).norm() / expected.norm()
    assert error < 0.25
    assert error < 0.5 * (forgotten - expected).norm() / expected.norm()
