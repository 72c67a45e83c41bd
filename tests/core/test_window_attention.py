"""Attention to a sliding window against masked dense attention, over pages of which some were never written."""

import pytest
import torch

from vllm_lrqk.core.window_attention import window_attention, window_decode

KV_HEADS, GROUP, D, PAGE = 2, 3, 32, 16


def make(length: int, window: int, tokens: int, seed: int = 0):
    """Rows of one request in shuffled pages, those before every window given back; queries of its last tokens."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-length // PAGE)
    rows = torch.full((count + 2, KV_HEADS, PAGE, 2, D), torch.nan)
    pages = torch.randperm(count + 1, generator=generator)[:count] + 1
    kv = torch.randn(KV_HEADS, length, 2, D, generator=generator)
    gone = max(0, length - tokens - window + 1) // PAGE
    for i in range(gone * PAGE, length):
        rows[pages[i // PAGE], :, i % PAGE] = kv[:, i]
    pages[:gone] = 0  # vLLM's null block
    return torch.randn(tokens, KV_HEADS * GROUP, D, generator=generator) * 2, kv, rows, pages.int()


def dense(query: torch.Tensor, kv: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """float64 [T, H, d]"""
    tokens, length = len(query), kv.shape[1]
    key, value = kv.double().repeat_interleave(GROUP, 0).unbind(2)
    scores = query.double().transpose(0, 1) @ key.mT * scale
    age = torch.arange(length - tokens, length)[:, None] - torch.arange(length)
    scores = scores.masked_fill((age < 0) | (age >= window), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("window", [1, 15, 16, 40, 1000])
@pytest.mark.parametrize(("length", "tokens"), [(1, 1), (16, 16), (70, 1), (70, 70), (200, 90), (700, 600)])
def test_chunks(length: int, tokens: int, window: int) -> None:
    query, kv, rows, pages = make(length, window, tokens)
    output = torch.full_like(query, torch.nan)
    window_attention(query, rows, pages, length - tokens, window, D**-0.5, output)
    torch.testing.assert_close(output.double(), dense(query, kv, window, D**-0.5), rtol=1e-5, atol=1e-5)


def test_single_tokens_and_padding() -> None:
    window, lengths = 20, [1, 19, 20, 21, 100]
    cases = [make(length, window, 1, seed) for seed, length in enumerate(lengths)]
    rows = torch.cat([case[2] for case in cases])
    table, start = torch.zeros(len(cases) + 1, 7, dtype=torch.int32), 0
    for row, case in enumerate(cases):
        table[row, : len(case[3])] = case[3] + start
        start += len(case[2])
    query = torch.cat([case[0] for case in cases] + [torch.ones_like(cases[0][0])])
    output = torch.full_like(query, torch.nan)
    window_decode(query, rows, table, torch.tensor([*lengths, 0]), window, D**-0.5, output)
    for row, case in enumerate(cases):
        expected = dense(case[0], case[1], window, D**-0.5)[0]
        torch.testing.assert_close(output[row].double(), expected, rtol=1e-5, atol=1e-5)
    assert (output[-1] == 0).all()
