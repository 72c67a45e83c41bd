import pytest
import torch

from vllm_lrqk.core import prefill
from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.prefill import merge, prefill_attention

PAGE_SIZE = 16
TOKENS = 131
# Float32 sums; with 16-bit inputs the kernel rounds its output once per part that is merged.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(
    heads: int, kv_heads: int, d: int, dtype: torch.dtype, tokens: int = TOKENS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * d)
    return tuple(torch.randn(tokens, n, d, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads))


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64: [T, H, d]."""
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
    scores = q @ k.mT * query.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def chunked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill in chunks that end at `ends`: outputs [T, H, d], the host pages, the request's pages."""
    num_pages = -(-len(key) // PAGE_SIZE)
    host = torch.full((num_pages + 1, key.shape[1], PAGE_SIZE, 2, key.shape[2]), torch.nan, dtype=key.dtype)
    pages = torch.randperm(num_pages + 1, generator=torch.Generator().manual_seed(1))[:num_pages].int()
    output = torch.full_like(query, torch.nan)
    start = 0
    for end in ends:
        chunk = slice(start, end)
        position = torch.arange(start, end)
        slot_mapping = pages.long()[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        append_rows(key[chunk], value[chunk], host, slot_mapping)
        scale = query.shape[-1] ** -0.5
        prefill_attention(query[chunk], key[chunk], value[chunk], host, pages, start, scale, output[chunk])
        start = end
    return output, host, pages


SPLITS = {
    "whole": [TOKENS],
    "pages": [64, 128, TOKENS],
    "odd": [1, 2, 19, 50, 113, TOKENS],
    "one-token-last": [130, TOKENS],
    "every-token": list(range(1, TOKENS + 1)),
}


@pytest.mark.parametrize("ends", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_chunks_equal_naive(ends, dtype):
    query, key, value = inputs(8, 2, 64, dtype)
    output, _, _ = chunked(query, key, value, ends)
    torch.testing.assert_close(output.double(), naive(query, key, value), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_shapes_equal_naive(group, d, dtype):
    query, key, value = inputs(2 * group, 2, d, dtype)
    output, _, _ = chunked(query, key, value, SPLITS["odd"])
    torch.testing.assert_close(output.double(), naive(query, key, value), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("tile_tokens", [16, 48, 112, 128, 4096])
def test_context_tiles_equal_naive(tile_tokens, monkeypatch):
    """Contexts of 1 to 130 tokens: below, at and above one tile."""
    monkeypatch.setattr(prefill, "TILE_TOKENS", tile_tokens)
    query, key, value = inputs(6, 3, 64, torch.float32)
    output, _, _ = chunked(query, key, value, [1, 16, 48, 96, 112, 128, 130, TOKENS])
    torch.testing.assert_close(output.double(), naive(query, key, value), rtol=2e-5, atol=2e-5)


def test_context_is_read_in_tiles(monkeypatch):
    """A 128-token context in tiles of 48 takes three parts besides the chunk's own."""
    lengths = []
    flash = prefill.flash_attention
    monkeypatch.setattr(prefill, "TILE_TOKENS", 48)

    def noted(query, key, *rest, **named):
        lengths.append(key.shape[1])
        return flash(query, key, *rest, **named)

    monkeypatch.setattr(prefill, "flash_attention", noted)
    query, key, value = inputs(4, 2, 64, torch.float32)
    chunked(query, key, value, [128, TOKENS])
    assert lengths == [128, 3, 48, 48, 32]


def test_append_writes_each_row_to_its_slot():
    query, key, value = inputs(2, 2, 64, torch.bfloat16)
    _, host, pages = chunked(query, key, value, SPLITS["odd"])
    rows = host[pages.long()].transpose(1, 2).flatten(0, 1)  # [P * N, KV, 2, d]
    assert torch.equal(rows[:TOKENS, :, 0], key)
    assert torch.equal(rows[:TOKENS, :, 1], value)
    assert bool(rows[TOKENS:].isnan().all())
    unused = set(range(len(host))) - set(pages.tolist())
    assert bool(host[list(unused)].isnan().all())


def test_negative_slots_are_skipped():
    key = torch.ones(3, 1, 64)
    host = torch.zeros(2, 1, PAGE_SIZE, 2, 64)
    append_rows(key, 2 * key, host, torch.tensor([-1, 20, -1]))
    assert float(host.sum()) == 64 + 128
    assert float(host[1, 0, 4, 0].sum()) == 64


def test_merge_is_attention_over_both_sets():
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(5, 30, generator=generator) * 30, torch.randn(30, 8, generator=generator)

    def part(span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return scores[:, span].softmax(-1) @ values[span], scores[:, span].logsumexp(-1)

    both, log_sum = merge(*part(slice(0, 11)), *part(slice(11, 30)))
    whole, whole_log_sum = part(slice(0, 30))
    torch.testing.assert_close(both, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_sum, whole_log_sum)
