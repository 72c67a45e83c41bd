"""The kernels of CUDA devices: csrc/cuda where it is built, Triton and torch for the rest.

Host pages are CPU memory registered with CUDA (vllm_lrqk/devices/pinned.py); everything else is on the device.
"""

from functools import cache, partial
from typing import Any

import torch

from vllm_lrqk.core.selection import Selection
from vllm_lrqk.devices import cuda_library, cuda_prefill, triton_parts
from vllm_lrqk.methods.lrqk import triton_attend, triton_select
from vllm_lrqk.methods.lrqk.cuda_select import SelectWorkspace, is_supported
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.seal import seal_rows
from vllm_lrqk.methods.lrqk.settings import LRQKConfig

SEAL_PAGES = 16
"""Pages that are sealed at once; their rows are copied to the device first."""


@cache
def kernels(operators: Any | None = None) -> Kernels:
    """The table for CUDA devices.

    Args:
        operators: of the compiled kernels; None: those of this installation.

    Raises:
        RuntimeError: the compiled kernels are missing. Appending, sealing and prefill read and write host memory from
            the device, which only they can; `vllm_lrqk.methods.lrqk.triton_select` is there without them.
    """
    operators = operators or cuda_library.operators()
    if operators is None:
        raise RuntimeError("vllm-lrqk has no CUDA kernels: install it with nvcc on the path (see docs/cuda.md).")
    selector = _Selector(operators)
    return Kernels(
        "cuda",
        partial(_append_rows, operators),
        partial(_seal_pages, operators),
        selector.select,
        partial(_decode_attention, selector),
        partial(cuda_prefill.prefill_attention, operators),
    )


class _Selector:
    """Keeps the memory of select from call to call, and grows it where a call does not fit."""

    def __init__(self, operators: Any) -> None:
        self.operators = operators
        self._workspaces: dict[tuple[torch.device, LRQKConfig, int, int], SelectWorkspace] = {}

    def select(
        self,
        query: torch.Tensor,
        factors: FactorPages,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        config: LRQKConfig,
    ) -> Selection:
        """As `vllm_lrqk.methods.lrqk.score.select`; what it returns is valid until the next call."""
        if config.top_p < 1 or not is_supported(query, factors, block_table):
            return triton_select.select(query, factors, block_table, seq_lens, scale, config)
        workspace = self._workspace(query, block_table, factors.raw.shape[1], config)
        return workspace.select(query, factors, block_table.int(), seq_lens.int(), scale)

    def _workspace(
        self, query: torch.Tensor, block_table: torch.Tensor, kv_heads: int, config: LRQKConfig
    ) -> SelectWorkspace:
        requests, heads, _ = query.shape
        key = (query.device, config, heads, kv_heads)
        found = self._workspaces.get(key)
        if found is not None and found.fits(query, block_table, kv_heads, config):
            return found
        if cuda_library.is_capturing(query.device):
            raise RuntimeError("select has no memory for this batch yet: run it once before capturing a graph")
        pages = block_table.shape[1]
        if found is not None:
            requests, pages = max(requests, found.max_requests), max(pages, found.max_pages)
        created = SelectWorkspace(self.operators, requests, pages, heads, kv_heads, config, query.device)
        self._workspaces[key] = created
        return created


def _append_rows(
    operators: Any, key: torch.Tensor, value: torch.Tensor, host: torch.Tensor, slots: torch.Tensor
) -> None:
    operators.cuda_append(key, value, host, slots, None, None, cuda_library.stream_handle(key.device))


def _seal_pages(
    operators: Any,
    pages: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    gram_q: torch.Tensor | None,
    config: LRQKConfig,
) -> None:
    device = factors.raw.device
    for start in range(0, len(pages), SEAL_PAGES):
        part = pages[start : start + SEAL_PAGES].contiguous()
        rows = torch.empty(len(part), *host.shape[1:], dtype=host.dtype, device=device)
        operators.cuda_gather_pages(host, part, rows, cuda_library.stream_handle(device))
        grams = None if gram_q is None else gram_q[start : start + SEAL_PAGES]
        seal_rows(part, rows, factors, grams, config)


def _decode_attention(
    selector: _Selector,
    query: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    config: LRQKConfig,
    output: torch.Tensor,
) -> torch.Tensor:
    """As `vllm_lrqk.methods.lrqk.decode.decode_attention`: without a hot cache every row comes from the host pages."""
    selection = selector.select(query, factors, block_table, seq_lens, scale, config)
    requests, heads, head_size = query.shape
    kv_heads = host.shape[1]
    address = triton_attend.host_addresses(selection.rows, block_table, host)
    splits = triton_attend.num_splits(
        requests * kv_heads, address.shape[-1], cuda_library.multiprocessors(query.device)
    )
    parts = triton_parts.allocate_parts(requests, kv_heads, splits, heads // kv_heads, head_size, query.device)
    left = (selection.residual, factors, block_table, selection.residual_factor)
    triton_attend.attend_rows(query, host, address, scale, parts, 0, splits, *left)
    triton_parts.combine(parts, output)
    return (selection.rows >= 0).sum((1, 2))
