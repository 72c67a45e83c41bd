"""LoLA's compiled CPU kernels: csrc/cpu/lola behind torch.ops.vllm_lrqk."""

from functools import cache, partial
from math import gcd
from typing import Any

import torch

from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.lola import attention
from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory, MemoryFormat
from vllm_lrqk.methods.lola.kernels import TORCH, Kernels
from vllm_lrqk.methods.lola.state import LEAST_VARIANCE, RIDGE, HedgehogState, SlopeState


@cache
def kernels(name: str | None = None) -> Kernels:
    """The kernels of one instruction set, or the best that there are.

    Raises:
        ValueError: `name` cannot run here.
    """
    names = cpu.instruction_sets_from(name)
    if not names:
        return TORCH
    return Kernels(f"cpu-{names[0]}", partial(_decode_attention, names), partial(_prefill_attention, names))


def _decode_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    blocks: torch.Tensor,
    seq_lens: torch.Tensor,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    index = _choose(names, query, key, value, memory, rules, output)
    if index is None:
        return attention.decode_attention(query, key, value, memory, blocks, seq_lens, rules, output)
    blocks = blocks if blocks.dtype == torch.int32 else blocks.int()
    key, value = _of_memory_heads(memory, key, value)
    return torch.ops.vllm_lrqk.cpu_lola_decode(
        query, key, value, *_state(memory, rules), blocks, cpu.int32(seq_lens), output, index
    )


def _prefill_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    block: int | torch.Tensor,
    context_len: int,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    index = _choose(names, query, key, value, memory, rules, output)
    if index is None:
        return attention.prefill_attention(query, key, value, memory, block, context_len, rules, output)
    key, value = _of_memory_heads(memory, key, value)
    return torch.ops.vllm_lrqk.cpu_lola_prefill(
        query, key, value, *_state(memory, rules), int(block), context_len, output, index
    )


def _choose(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    rules: Rules,
    output: torch.Tensor,
) -> int | None:
    """Index of the instruction set that can do this; None: the plain torch form has to."""
    dtypes = {tensor.dtype for tensor in (query, key, value, output)} | {memory.format.dtype}
    if len(dtypes) > 1 or query.dtype not in cpu.DTYPES:
        return None
    return cpu.pick(names, vector_size(memory.format))


def vector_size(memory_format: MemoryFormat) -> int:
    """The number that vectors have to divide: the head size, and the columns of a feature map if there is one."""
    columns = memory_format.num_features // 2
    if memory_format.settings.state != "hedgehog" or memory_format.head_size > cpu.MAX_HEAD_SIZE:
        return memory_format.head_size
    return gcd(memory_format.head_size, columns)


def _of_memory_heads(memory: Memory, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[T, KV, d] once for each of the memory's heads, [T, K, d]."""
    copies = memory.heads // rows[0].shape[1]
    return rows if copies == 1 else tuple(each.repeat_interleave(copies, 1) for each in rows)


def _state(memory: Memory, rules: Rules) -> tuple[Any, ...]:
    """What both operators say of the layer."""
    none = torch.empty(memory.heads, 0, memory.format.head_size)
    directions, maps = (none, none), (none, none)
    bias, kappa = torch.empty(0), torch.empty(0, memory.format.head_size)
    if isinstance(rules.state, SlopeState):
        directions = rules.state.directions.query, rules.state.directions.key
    elif isinstance(rules.state, HedgehogState):
        learned = rules.state.maps
        maps, bias = (learned.query, learned.key), learned.bias
        kappa = kappa if learned.kappa is None else learned.kappa
    numbers = rules.scale, RIDGE, LEAST_VARIANCE
    return memory.raw, _layout(memory.format), *directions, *maps, bias, kappa, *numbers


@cache
def _layout(memory_format: MemoryFormat) -> list[int]:
    layout = memory_format.layout
    names = torch.ops.vllm_lrqk.cpu_lola_layout().split(",")[:-1]
    return [int(layout[name]) for name in names]
