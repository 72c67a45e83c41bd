"""Exact attention of a prompt chunk on a CUDA device: causal inside the chunk, history in tiles from the host pages.

Tiles come over the copy stream into two buffers in turn: while one is attended, the next one is on its way. The parts
are merged by log-sum-exp. The attention kernel is a function, so that the layer above can pass a better one:

    attention(query [heads, T, d], key [heads, S, d], value [heads, S, d], scale, causal)
        -> output float32 [heads, T, d], log-sum-exp float32 [heads, T]

Prompts without history need no parts: one call attends any number of them.
"""

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.prefill import TILE_TOKENS, merge
from vllm_lrqk.core.step import PromptRun
from vllm_lrqk.devices.cuda_library import stream_handle

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], tuple[torch.Tensor, torch.Tensor]]
PromptAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float], torch.Tensor]
"""(query [T, H, d], key and value [T, KV, d], starts int32 [prompts + 1], longest prompt, scale) -> output [T, H, d]"""


def torch_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's flash attention, and its memory-efficient one for float32, with the log-sum-exp."""
    arguments = (query[None], key[None], value[None])
    if query.dtype == torch.float32:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        out, log_sum = efficient(*arguments, None, True, is_causal=causal, scale=scale)[:2]
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, log_sum = flash(*arguments, is_causal=causal, scale=scale)[:2]
    return out[0].float(), log_sum[0, :, : query.shape[1]].float()


def xformers_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """xformers' partial attention, where that is installed."""
    from xformers.ops import fmha

    bias = fmha.attn_bias.LowerTriangularMask() if causal else None
    arguments = (x.transpose(0, 1)[None].contiguous() for x in (query, key, value))  # [1, T, heads, d]
    out, log_sum = fmha.memory_efficient_attention_partial(*arguments, attn_bias=bias, scale=scale)
    return out[0].transpose(0, 1).float(), log_sum[0, :, : query.shape[1]].float()


def torch_prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Torch's flash attention for sequences of different lengths: bfloat16 and float16."""
    flash = torch.ops.aten._flash_attention_forward
    return flash(query, key, value, starts, starts, longest, longest, 0.0, True, False, scale=scale)[0]


def default_prompt_attention() -> PromptAttention:
    """What attends many prompts in one call."""
    return torch_prompt_attention


@cache
def default_attention() -> Attention:
    """xformers' kernel where it is installed (it serves more devices than torch's flash attention), else torch's."""
    return xformers_attention if importlib.util.find_spec("xformers") else torch_attention


class TileStream:
    """Brings tiles of host pages to the device, one ahead of the reader.

    Args:
        operators: see `vllm_lrqk.devices.cuda_library.operators`.
        host: [num_pages, KV, N, 2, d], memory that the device can read.
        pages: int64 [P] on the device, the pages to bring.
        tile_pages: pages per tile.
    """

    def __init__(self, operators: Any, host: torch.Tensor, pages: torch.Tensor, tile_pages: int) -> None:
        self._operators, self._host = operators, host
        self._tiles = pages.split(tile_pages) if len(pages) else ()
        shape = (min(tile_pages, len(pages)), *host.shape[1:])
        self._buffers = [torch.empty(shape, dtype=host.dtype, device=pages.device) for _ in self._tiles[:2]]
        self._device = pages.device
        self._stream = torch.cuda.Stream(pages.device) if pages.device.type == "cuda" else None

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Tiles [pages of the tile, KV, N, 2, d]; each is valid until the next one is asked for."""
        arrived = [self._bring(0)] if self._tiles else []
        for i, tile in enumerate(self._tiles):
            if i + 1 < len(self._tiles):
                arrived.append(self._bring(i + 1))
            if self._stream is not None:
                torch.cuda.current_stream(self._device).wait_event(arrived[i])
            yield self._buffers[i % 2][: len(tile)]

    def _bring(self, index: int) -> Any:
        """Start copying a tile after what the reader has launched so far; the event of its arrival."""
        tile, buffer = self._tiles[index], self._buffers[index % 2]
        if self._stream is None:
            self._operators.cuda_gather_pages(self._host, tile, buffer, 0)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._operators.cuda_gather_pages(self._host, tile, buffer, stream_handle(self._device))
            return self._stream.record_event()


def prefill_attention(
    operators: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    host: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
    attention: Attention | None = None,
) -> None:
    """As `vllm_lrqk.core.prefill.prefill_attention`, with tensors on the device and pinned host pages.

    Args:
        query, output: [T, H, d], the chunk's tokens at positions context_len ... context_len + T - 1.
        key, value: [T, KV, d].
        host: [num_pages, KV, N, 2, d], memory that the device can read.
        pages: int [P], the request's pages in order.
    """
    assert logits.is_plain, "refused at start-up"
    attention = attention or default_attention()
    tokens, heads, _ = query.shape
    page_size, kv_heads = host.shape[2], host.shape[1]
    group = heads // kv_heads
    chunk_key, chunk_value = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
    total, log_sum = attention(query.transpose(0, 1), chunk_key, chunk_value, scale, True)
    # History needs no mask, so the query heads of one KV head become rows of one problem.
    rows = query.transpose(0, 1).reshape(kv_heads, group * tokens, -1)
    total, log_sum = total.reshape(rows.shape), log_sum.reshape(rows.shape[:2])
    tile_pages = max(1, TILE_TOKENS // page_size)
    history = pages[: -(-context_len // page_size)].long()
    start = 0
    for tile in TileStream(operators, host, history, tile_pages):
        length = min(tile.shape[0] * page_size, context_len - start)
        start += length
        history_rows = tile.transpose(0, 1).flatten(1, 2)[:, :length]  # [KV, length, 2, d]
        part = attention(rows, history_rows[:, :, 0], history_rows[:, :, 1], scale, False)
        total, log_sum = merge(total, log_sum, *part)
    output.copy_(total.reshape(heads, tokens, -1).transpose(0, 1))


def prefill_prompts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, run: PromptRun, scale: float, output: torch.Tensor
) -> None:
    """Attend several prompts without history: one call for all of them, or one for each in float32.

    Args:
        query, output: [T, H, d], the run's tokens.
        key, value: [T, KV, d].
    """
    if query.dtype != torch.float32:
        output.copy_(default_prompt_attention()(query, key, value, run.starts, max(run.lens), scale))
        return
    group = query.shape[1] // key.shape[1]
    parts = (x.split(run.lens) for x in (query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)))
    for part, q, k, v in zip(output.split(run.lens), *parts):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        part.copy_(default_attention()(q, k, v, scale, True)[0].transpose(0, 1))
