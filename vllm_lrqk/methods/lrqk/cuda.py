"""LRQK's kernels on whole pages for CUDA devices: sealing in torch on rows that csrc/cuda gathers, and prefill.

Host pages are CPU memory registered with CUDA (vllm_lrqk/devices/pinned.py); everything else is on the device.
"""

from functools import partial
from typing import Any

import torch

from vllm_lrqk.devices import cuda_library, cuda_prefill
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import PageKernels
from vllm_lrqk.methods.lrqk.seal import seal_rows
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

SEAL_PAGES = 16
"""Pages of one layer that are sealed at once; their rows are copied to the device first."""
SEAL_LAYER_PAGES = 32
"""Pages of all layers together that are sealed at once: one page at least of every layer."""


def kernels(operators: Any) -> PageKernels:
    """The table for CUDA devices, with the operators of `cuda_library.load`."""
    return PageKernels(
        name="cuda",
        seal_pages=partial(_seal_pages, operators),
        prefill_attention=partial(cuda_prefill.prefill_attention, operators),
        seal_layers=partial(_seal_layers, operators),
        prefill_prompts=cuda_prefill.prefill_prompts,
    )


def _seal_pages(
    operators: Any,
    pages: torch.Tensor,
    host: torch.Tensor,
    factors: FactorPages,
    config: LRQKSettings,
) -> None:
    device = factors.raw.device
    for start in range(0, len(pages), SEAL_PAGES):
        part = pages[start : start + SEAL_PAGES].contiguous()
        rows = torch.empty(len(part), *host.shape[1:], dtype=host.dtype, device=device)
        operators.cuda_gather_pages(host, part, rows, cuda_library.stream_handle(device))
        seal_rows(part, rows, factors, config)


def _seal_layers(
    operators: Any, pages: torch.Tensor, hosts: list[torch.Tensor], factors: list[FactorPages], config: LRQKSettings
) -> None:
    """Seal the same pages of layers of one shape: one sequence of launches instead of one for each layer."""
    device, form, layers = factors[0].raw.device, factors[0].format, len(hosts)
    for part in pages.split(max(1, SEAL_LAYER_PAGES // layers)):
        rows = torch.empty(layers, len(part), *hosts[0].shape[1:], dtype=hosts[0].dtype, device=device)
        addresses = [host.data_ptr() for host in hosts]
        operators.cuda_gather_layers(hosts[0], addresses, part, rows, cuda_library.stream_handle(device))
        raw = factors[0].raw.new_zeros(layers * len(part), *factors[0].raw.shape[1:])
        seal_rows(torch.arange(len(raw), device=device), rows.flatten(0, 1), FactorPages(raw, form), config)
        for own, sealed in zip(factors, raw.unflatten(0, (layers, len(part)))):
            own.raw[part] = sealed
