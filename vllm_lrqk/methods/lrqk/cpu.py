"""Compiled CPU kernels of LRQK: csrc/cpu/lrqk behind torch.ops.vllm_lrqk."""

from functools import cache, partial

import torch

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.selection import Selection, candidate_range
from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.lrqk import torch_ops
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.seal import KEY_SHARE
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.values import RIDGE, VALUE_ITERATIONS, VALUE_SHIFT


@cache
def kernels(name: str | None = None) -> Kernels:
    """The kernels of one instruction set, or the best that there are.

    Raises:
        ValueError: `name` cannot run here.
    """
    names = cpu.instruction_sets_from(name)
    if not names:
        return torch_ops.kernels()
    return Kernels(
        name=f"cpu-{names[0]}",
        seal_pages=partial(_seal_pages, names),
        prefill_attention=partial(cpu.prefill_attention, names),
        append_rows=partial(cpu.append_rows, names),
        seal_calibrated=partial(_seal_calibrated, names),
        select=partial(_select, names),
        decode_attention=partial(_decode_attention, names),
    )


@cache
def _page_layout(page_format: PageFormat | CalibratedFormat) -> list[int]:
    return page_format.layout_values(torch.ops.vllm_lrqk.cpu_page_layout_names())


def _seal_pages(
    names: tuple[str, ...],
    pages: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    config: LRQKSettings,
) -> None:
    index = cpu.pick(names, host.shape[-1])
    if index is None or host.dtype not in cpu.DTYPES or config.factorization != "lrqk":
        return torch_ops.seal_pages(pages, host, factors, config)
    return torch.ops.vllm_lrqk.cpu_seal(
        pages.long().contiguous(),
        host,
        factors.raw,
        _page_layout(factors.format),
        config.iterations,
        config.lambda_q,
        config.lambda_k,
        RIDGE,
        KEY_SHARE,
        VALUE_SHIFT,
        VALUE_ITERATIONS,
        index,
    )


def _seal_calibrated(
    names: tuple[str, ...],
    pages: torch.Tensor,
    page_numbers: torch.Tensor,
    host: torch.Tensor,
    factors: CalibratedPages,
) -> None:
    index = cpu.pick(names, host.shape[-1])
    if index is None or host.dtype not in cpu.DTYPES:
        return torch_ops.seal_calibrated(pages, page_numbers, host, factors)
    return torch.ops.vllm_lrqk.cpu_seal_calibrated(
        pages.long().contiguous(),
        page_numbers.long().contiguous(),
        host,
        factors.raw,
        factors.basis.kernel_tensors,
        _page_layout(factors.format),
        RIDGE,
        index,
    )


def _basis(factors: FactorPages | CalibratedPages) -> list[torch.Tensor]:
    return factors.basis.kernel_tensors if isinstance(factors, CalibratedPages) else []


def _decode_attention(
    names: tuple[str, ...],
    query: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages | CalibratedPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
    output: torch.Tensor,
    logits: Logits = PLAIN,
) -> torch.Tensor:
    index = cpu.pick(names, query.shape[-1])
    if index is None or query.dtype not in cpu.DTYPES or not query.dtype == host.dtype == output.dtype:
        return torch_ops.decode_attention(query, host, factors, block_table, seq_lens, scale, config, output, logits)
    attended = torch.empty(len(query), dtype=torch.int64)
    torch.ops.vllm_lrqk.cpu_decode(
        query,
        host,
        factors.raw,
        cpu.int32(block_table),
        cpu.int32(seq_lens),
        scale,
        logits.cap,
        logits.sinks,
        _page_layout(factors.format),
        config.top_k,
        config.top_p,
        config.recent_tokens,
        config.sink_tokens,
        config.residual != "none",
        _basis(factors),
        output,
        attended,
        index,
    )
    return attended


def _select(
    names: tuple[str, ...],
    query: torch.Tensor,
    factors: FactorPages | CalibratedPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKSettings,
    logits: Logits = PLAIN,
) -> Selection:
    index = cpu.pick(names, query.shape[-1])
    if index is None or query.dtype not in cpu.DTYPES:
        return torch_ops.select(query, factors, block_table, seq_lens, scale, config, logits)
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
            moment = torch.zeros(*residual.shape, factors.format.value_rank, dtype=torch.float32)
    torch.ops.vllm_lrqk.cpu_select(
        query,
        factors.raw,
        cpu.int32(block_table),
        cpu.int32(seq_lens),
        scale,
        logits.cap,
        _page_layout(factors.format),
        n,
        config.top_k,
        config.top_p,
        config.recent_tokens,
        config.sink_tokens,
        _basis(factors),
        positions,
        residual,
        moment,
        index,
    )
    return Selection(positions, residual, moment)
