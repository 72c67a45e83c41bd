"""Compiled CPU kernels of AQUA: csrc/cpu/aqua behind torch.ops.vllm_lrqk."""

from functools import partial

import torch

from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.aqua.basis import Basis
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.kernels import TORCH, Kernels
from vllm_lrqk.methods.aqua.settings import AquaSettings

_MAX_STORED = 512


def kernels(name: str | None = None) -> Kernels:
    """The kernels of one instruction set, or the best that there are.

    Raises:
        ValueError: `name` cannot run here.
    """
    names = cpu.instruction_sets_from(name)
    if not names:
        return TORCH
    return Kernels(
        f"cpu-{names[0]}", partial(_append, names), TORCH.prefill_attention, partial(_decode_attention, names)
    )


def _pick(names: tuple[str, ...], block_format: BlockFormat) -> int | None:
    """Index of the first instruction set whose vectors divide blocks, values and stored dimensions."""
    f = block_format
    if f.stored > _MAX_STORED:
        return None
    for name in names:
        width = cpu.VECTOR_ELEMENTS[name]
        if f.block_size % (2 * width) == f.head_size % (2 * width) == f.stored % width == 0:
            return cpu.INSTRUCTION_SETS.index(name)
    return None


def served_name(name: str, block_format: BlockFormat) -> str:
    """Name of what computes for blocks of this format, where the table of kernels is called `name`."""
    if not name.startswith("cpu-"):
        return name
    names = cpu.instruction_sets_from(name.removeprefix("cpu-"))
    return cpu.served_name(name, _pick(names, block_format))


def _offsets(block_format: BlockFormat) -> tuple[int, bool, int, int]:
    f = block_format
    return f.block_size, f.is_quantized, f.value_offset, f.key_scale_offset


def _append(
    names: tuple[str, ...],
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    basis: Basis,
    slot_mapping: torch.Tensor,
) -> None:
    index = _pick(names, blocks.format)
    if index is None or not key.dtype == value.dtype == blocks.format.value_dtype or key.dtype not in cpu.DTYPES:
        return TORCH.append(key, value, blocks, basis, slot_mapping)
    return torch.ops.vllm_lrqk.cpu_aqua_append(
        key,
        value,
        blocks.raw,
        basis.projection,
        basis.offset,
        basis.sigma,
        slot_mapping.long().contiguous(),
        *_offsets(blocks.format),
        index,
    )


def _decode_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    blocks: Blocks,
    basis: Basis,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: AquaSettings,
    output: torch.Tensor,
) -> None:
    index = _pick(names, blocks.format)
    if index is None or not query.dtype == output.dtype == blocks.format.value_dtype or query.dtype not in cpu.DTYPES:
        return TORCH.decode_attention(query, blocks, basis, block_table, seq_lens, scale, config, output)
    return torch.ops.vllm_lrqk.cpu_aqua_decode(
        query,
        blocks.raw,
        basis.projection,
        basis.offset,
        basis.sigma,
        cpu.int32(block_table),
        cpu.int32(seq_lens),
        scale,
        config.num_kept(blocks.format.head_size),
        config.choose == "query_head",
        *_offsets(blocks.format),
        output,
        index,
    )
