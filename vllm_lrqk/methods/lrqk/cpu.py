"""Compiled CPU kernels: csrc/cpu behind torch.ops.vllm_lrqk."""

import logging
from functools import cache, partial
from pathlib import Path

import torch

from vllm_lrqk.core.selection import Selection, candidate_range
from vllm_lrqk.methods.lrqk import torch_ops
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.seal import QUERY_SHARE
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.values import RIDGE, VALUE_ITERATIONS, VALUE_SHIFT

logger = logging.getLogger(__name__)
LIBRARY = Path(__file__).parents[2] / "_cpu_kernels.so"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
"""In the order of csrc/cpu/dispatch.h, best first."""
_VECTOR_ELEMENTS = {"avx512": 16, "avx2": 8, "portable": 4}
_MAX_HEAD_SIZE = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def instruction_sets() -> tuple[str, ...]:
    """What this build and this machine can run, best first; empty without the compiled library."""
    if not LIBRARY.exists():
        logger.info("CPU kernels of vllm-lrqk were not built when it was installed; using the plain torch forms.")
        return ()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        logger.warning("CPU kernels of vllm-lrqk do not load (%s); using the plain torch forms.", error)
        return ()
    return tuple(filter(None, torch.ops.vllm_lrqk.cpu_instruction_sets().split(",")))


@cache
def kernels(name: str | None = None) -> Kernels:
    """The kernels of one instruction set, or the best that there are.

    Raises:
        ValueError: `name` cannot run here.
    """
    available = instruction_sets()
    if name is None and not available:
        return torch_ops.kernels()
    if name is not None and name not in available:
        raise ValueError(f"CPU kernels {name!r} cannot run here; available: {', '.join(available) or 'none'}.")
    names = available[available.index(name) if name else 0 :]
    return Kernels(
        name=f"cpu-{names[0]}",
        seal_pages=partial(_seal_pages, names),
        prefill_attention=partial(_prefill_attention, names),
        append_rows=partial(_append_rows, names),
        select=partial(_select, names),
        decode_attention=partial(_decode_attention, names),
    )


def _pick(names: tuple[str, ...], head_size: int) -> int | None:
    """Index of the first instruction set whose vectors divide the head size; None where the torch forms have to do."""
    for name in names:
        if head_size % (2 * _VECTOR_ELEMENTS[name]) == 0 and head_size <= _MAX_HEAD_SIZE:
            return INSTRUCTION_SETS.index(name)
    return None


def _int32(tensor: torch.Tensor) -> torch.Tensor:
    """The last dimension is contiguous."""
    if tensor.dtype == torch.int32 and tensor.stride(-1) == 1:
        return tensor
    return tensor.to(torch.int32).contiguous()


@cache
def _page_layout(page_format: PageFormat) -> list[int]:
    return page_format.layout_values(torch.ops.vllm_lrqk.cpu_page_layout_names())


def _append_rows(
    names: tuple[str, ...], key: torch.Tensor, value: torch.Tensor, host: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    if not key.dtype == value.dtype == host.dtype:
        return torch_ops.append_rows(key, value, host, slot_mapping)
    slot_mapping = slot_mapping.long().contiguous()
    return torch.ops.vllm_lrqk.cpu_append(key, value, host, slot_mapping, INSTRUCTION_SETS.index(names[0]))


def _seal_pages(
    names: tuple[str, ...],
    pages: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    gram_q: torch.Tensor | None,
    config: LRQKSettings,
) -> None:
    index = _pick(names, host.shape[-1])
    if index is None or host.dtype not in _DTYPES or config.factorization != "lrqk":
        return torch_ops.seal_pages(pages, host, factors, gram_q, config)
    return torch.ops.vllm_lrqk.cpu_seal(
        pages.long().contiguous(),
        host,
        factors.raw,
        None if gram_q is None else gram_q.contiguous(),
        _page_layout(factors.format),
        config.iterations,
        config.lambda_q,
        config.lambda_k,
        RIDGE,
        QUERY_SHARE,
        VALUE_SHIFT,
        VALUE_ITERATIONS,
        index,
    )


def _prefill_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    host: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    scale: float,
    output: torch.Tensor,
) -> None:
    index = _pick(names, query.shape[-1])
    dtypes = {query.dtype, key.dtype, value.dtype, host.dtype, output.dtype}
    if index is None or len(dtypes) > 1 or query.dtype not in _DTYPES or _has_matrix_units(query.dtype):
        return torch_ops.prefill_attention(query, key, value, host, pages, context_len, scale, output)
    return torch.ops.vllm_lrqk.cpu_prefill(query, key, value, host, _int32(pages), context_len, scale, output, index)


@cache
def _has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether torch's own attention uses tile instructions for this dtype, which our float32 products cannot match."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def _decode_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
    output: torch.Tensor,
) -> torch.Tensor:
    index = _pick(names, query.shape[-1])
    if index is None or query.dtype not in _DTYPES or not query.dtype == host.dtype == output.dtype:
        return torch_ops.decode_attention(query, host, factors, block_table, seq_lens, scale, config, output)
    attended = torch.empty(len(query), dtype=torch.int64)
    torch.ops.vllm_lrqk.cpu_decode(
        query,
        host,
        factors.raw,
        _int32(block_table),
        _int32(seq_lens),
        scale,
        _page_layout(factors.format),
        config.top_k,
        config.top_p,
        config.recent_tokens,
        config.sink_tokens,
        config.residual != "none",
        output,
        attended,
        index,
    )
    return attended


def _select(
    names: tuple[str, ...],
    query: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
) -> Selection:
    index = _pick(names, query.shape[-1])
    if index is None or query.dtype not in _DTYPES:
        return torch_ops.select(query, factors, block_table, seq_lens, scale, config)
    n = config.page_size
    first, end = candidate_range(seq_lens, config)
    longest = int(end.max())
    num_pages = -(-longest // n) if longest > first else 0
    capacity = min(config.top_k, num_pages * n) + config.sink_tokens + config.recent_tokens + n
    positions = torch.empty(len(query), factors.raw.shape[1], capacity, dtype=torch.int32)
    residual = moment = None
    if config.residual != "none" and num_pages > 0:
        residual = torch.empty(*query.shape[:2], num_pages, dtype=torch.float32)
        if config.residual == "linear":
            moment = torch.zeros(*residual.shape, config.num_value_ranks, dtype=torch.float32)
    torch.ops.vllm_lrqk.cpu_select(
        query,
        factors.raw,
        _int32(block_table),
        _int32(seq_lens),
        scale,
        _page_layout(factors.format),
        n,
        config.top_k,
        config.top_p,
        config.recent_tokens,
        config.sink_tokens,
        positions,
        residual,
        moment,
        index,
    )
    return Selection(positions, residual, moment)
