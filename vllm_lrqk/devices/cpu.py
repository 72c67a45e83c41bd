"""The compiled CPU library, and its kernels that no method owns: csrc/cpu behind torch.ops.vllm_lrqk."""

import logging
from functools import cache
from pathlib import Path

import torch

from vllm_lrqk.core import host_pages, prefill, window_attention
from vllm_lrqk.core.logits import PLAIN, Logits

logger = logging.getLogger("vllm.lrqk")  # below vLLM's own, whose level and handlers hold for it
LIBRARY = Path(__file__).parents[1] / "_cpu_kernels.so"
INSTRUCTION_SETS = ("avx512", "avx2", "portable")
"""In the order of csrc/cpu/dispatch.h, best first."""
VECTOR_ELEMENTS = {"avx512": 16, "avx2": 8, "portable": 4}
MAX_HEAD_SIZE = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def instruction_sets() -> tuple[str, ...]:
    """What this build and this machine can run, best first; empty without the compiled library."""
    if not LIBRARY.exists():
        logger.warning("CPU kernels of vllm-lrqk were not built when it was installed; using the plain torch forms.")
        return ()
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        logger.warning("CPU kernels of vllm-lrqk do not load (%s); using the plain torch forms.", error)
        return ()
    return tuple(filter(None, torch.ops.vllm_lrqk.cpu_instruction_sets().split(",")))


def instruction_sets_from(name: str | None) -> tuple[str, ...]:
    """The instruction sets from `name` on, or all that there are.

    Raises:
        ValueError: `name` cannot run here.
    """
    available = instruction_sets()
    if name is not None and name not in available:
        raise ValueError(f"CPU kernels {name!r} cannot run here; available: {', '.join(available) or 'none'}.")
    return available[available.index(name) if name else 0 :]


def pick(names: tuple[str, ...], head_size: int) -> int | None:
    """Index of the first instruction set whose vectors divide the head size; None where the torch forms have to do."""
    for name in names:
        if head_size % (2 * VECTOR_ELEMENTS[name]) == 0 and head_size <= MAX_HEAD_SIZE:
            return INSTRUCTION_SETS.index(name)
    return None


def served_name(name: str, index: int | None) -> str:
    """Name of what computes where a table of kernels, `name`, found the instruction set with this index, or none."""
    if not name.startswith("cpu-"):
        return name
    return "torch" if index is None else f"cpu-{INSTRUCTION_SETS[index]}"


def name_for(name: str, head_size: int) -> str:
    """Name of what computes for a head size, where the table of kernels is called `name`."""
    if not name.startswith("cpu-"):
        return name
    return served_name(name, pick(instruction_sets_from(name.removeprefix("cpu-")), head_size))


def hint_for(name: str, served: str, head_size: int) -> str:
    """What to say where kernels called `served` compute instead of those called `name`; nothing if it is the same."""
    if name == served:
        return ""
    by = "plain torch" if served == "torch" else f"the {served} kernels"
    return f"head size {head_size} does not fill the vectors of {name}, so {by} serve it: decode steps are slower."


def int32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in int32; its last dimension is contiguous."""
    if tensor.dtype == torch.int32 and tensor.stride(-1) == 1:
        return tensor
    return tensor.to(torch.int32).contiguous()


def append_rows(
    names: tuple[str, ...], key: torch.Tensor, value: torch.Tensor, host: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """As `host_pages.append_rows`."""
    if not key.dtype == value.dtype == host.dtype:
        return host_pages.append_rows(key, value, host, slot_mapping)
    slot_mapping = slot_mapping.long().contiguous()
    return torch.ops.vllm_lrqk.cpu_append(key, value, host, slot_mapping, INSTRUCTION_SETS.index(names[0]))


def prefill_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    host: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """As `prefill.prefill_attention`."""
    index = pick(names, query.shape[-1])
    dtypes = {query.dtype, key.dtype, value.dtype, host.dtype, output.dtype}
    is_torch_faster = not logits.cap and _has_matrix_units(query.dtype)
    if index is None or len(dtypes) > 1 or query.dtype not in DTYPES or is_torch_faster:
        return prefill.prefill_attention(query, key, value, host, pages, context_len, scale, output, logits)
    inputs = query, key, value, host, int32(pages)
    rest = logits.cap, logits.sinks, output, index
    return torch.ops.vllm_lrqk.cpu_prefill(*inputs, context_len, 0, scale, *rest)


def window_prefill(
    names: tuple[str, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    context_len: int,
    window: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """As `window_attention.window_attention`, with the tokens' own keys and values [T, KV, d] beside the pages."""
    index = pick(names, query.shape[-1])
    dtypes = {query.dtype, key.dtype, value.dtype, rows.dtype, output.dtype}
    if index is None or len(dtypes) > 1 or query.dtype not in DTYPES:
        return window_attention.window_attention(query, rows, pages, context_len, window, scale, output, logits)
    inputs = query, key, value, rows, int32(pages)
    return torch.ops.vllm_lrqk.cpu_prefill(*inputs, context_len, window, scale, logits.cap, logits.sinks, output, index)


def window_decode(
    names: tuple[str, ...],
    query: torch.Tensor,
    rows: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    window: int,
    scale: float,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> None:
    """As `window_attention.window_decode`."""
    index = pick(names, query.shape[-1])
    if index is None or query.dtype not in DTYPES or not query.dtype == rows.dtype == output.dtype:
        return window_attention.window_decode(query, rows, block_table, seq_lens, window, scale, output, logits)
    inputs = query, rows, int32(block_table), int32(seq_lens)
    return torch.ops.vllm_lrqk.cpu_window_decode(*inputs, window, scale, logits.cap, logits.sinks, output, index)


@cache
def _has_matrix_units(dtype: torch.dtype) -> bool:
    """Whether torch's own attention uses tile instructions for this dtype, which our float32 products cannot match."""
    return dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
