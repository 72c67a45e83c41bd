"""Prefill attention on CPU tensors, in the place of the kernels that torch has for CUDA alone."""

from itertools import pairwise

import pytest
import torch

from vllm_lrqk.core.prefill import flash_attention
from vllm_lrqk.devices import cuda_prefill


def prompt_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """As `cuda_prefill.torch_prompt_attention`, prompt by prompt."""
    group, output = query.shape[1] // key.shape[1], torch.empty_like(query)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    lengths = starts.diff()
    assert int(starts[0]) == 0
    assert int(starts[-1]) == len(query)
    assert int(lengths.max()) == longest
    for start, end in pairwise(starts.tolist()):
        part = (x[start:end].transpose(0, 1) for x in (query, key, value))
        output[start:end] = flash_attention(*part, scale, causal=True)[0].transpose(0, 1)
    return output


def use_host_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CUDA path attend prompts on the CPU."""
    monkeypatch.setattr(cuda_prefill, "default_attention", lambda: flash_attention)
    monkeypatch.setattr(cuda_prefill, "default_prompt_attention", lambda: prompt_attention)
