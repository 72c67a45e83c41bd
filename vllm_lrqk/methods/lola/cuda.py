"""LoLA's kernels for CUDA devices, in Triton; none of them waits for the host.

Hardly run on a GPU yet (docs/lola.md): tested with Triton's interpreter.
"""

from functools import partial

import torch

from vllm_lrqk.devices.triton_parts import allocate_parts, combine
from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.kernels import Kernels
from vllm_lrqk.methods.lola.triton_advance import Workspace, advance
from vllm_lrqk.methods.lola.triton_attend import TILE, attend


def kernels(multiprocessors: int) -> Kernels:
    """Args: multiprocessors: of the device; decode steps fill it twice."""
    return Kernels("triton", partial(_decode_attention, multiprocessors), _prefill_attention)


def _decode_attention(
    multiprocessors: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    blocks: torch.Tensor,
    seq_lens: torch.Tensor,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    requests, heads, head_size = query.shape
    settings, items = rules.settings, requests * memory.heads
    tiles = -(-(settings.ring_rows + settings.cache) // TILE)
    splits = max(1, min(-(-2 * multiprocessors // items), tiles))
    parts = allocate_parts(requests, memory.heads, splits, heads // memory.heads, head_size, query.device)
    workspace = Workspace(requests, memory.heads, rules, query.device)
    advance(key, value, memory, blocks, seq_lens, 0, rules, workspace)
    attend(query, memory, blocks, seq_lens, 0, rules, parts)
    combine(parts, output)


def _prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    block: torch.Tensor,
    context_len: int,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    """Span after span: the tokens between two updates."""
    settings, (count, heads, head_size) = rules.settings, query.shape
    workspace = Workspace(1, memory.heads, rules, query.device)
    blocks, start = block.reshape(1), 0
    while start < count:
        seen = context_len + start
        span_end = settings.ring_rows + settings.updates(seen + 1) * settings.chunk
        stop = min(count, start + span_end - seen)
        span = slice(start, stop)
        advance(key[span], value[span], memory, blocks, None, seen + 1, rules, workspace)
        parts = allocate_parts(stop - start, memory.heads, 1, heads // memory.heads, head_size, query.device)
        attend(query[span], memory, blocks, None, seen + 1, rules, parts)
        combine(parts, output[span])
        start = stop
