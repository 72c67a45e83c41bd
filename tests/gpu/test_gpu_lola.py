"""LoLA's Triton kernels on the device against the plain torch form on the CPU."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cpu_kernel_cases import relative_error
from lola_cases import Tokens, kept_positions, make_memory, make_rules, make_tokens

from vllm_lrqk.devices.cuda_library import multiprocessors
from vllm_lrqk.methods.lola import cuda
from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.kernels import TORCH, Kernels
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import SlopeState

# Sums in another order; products of 16 bits also round probabilities, and tensor cores the float32 ones to tf32.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 2**-6, torch.float16: 2**-9}
KINDS = {
    "defaults": LolaSettings(),
    "random": LolaSettings(select="random"),
    "none": LolaSettings(state="none"),
    "small": LolaSettings(window=48, chunk=32, cache=7, state_rank=12),
}


def serve(
    kernels: Kernels, rules: Rules, tokens: Tokens, cuts: list[int], memory: Memory, device: torch.device
) -> torch.Tensor:
    query, key, value = (x.to(device) for x in (tokens.query, tokens.key, tokens.value))
    output, block = torch.full_like(query, torch.nan), torch.tensor([1], dtype=torch.int32, device=device)
    for start, end in pairwise([0, *cuts]):
        of = slice(start, end)
        kernels.prefill_attention(query[of], key[of], value[of], memory, block[0], start, rules, output[of])
    for i in range(cuts[-1], len(query)):
        of, lens = slice(i, i + 1), torch.tensor([i + 1], dtype=torch.int32, device=device)
        kernels.decode_attention(query[of], key[of], value[of], memory, block, lens, rules, output[of])
    return output.cpu()


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("group", "head_size"), [(4, 128), (7, 64), (1, 96)])
def test_against_torch(device: torch.device, kind: str, dtype: torch.dtype, group: int, head_size: int) -> None:
    settings, cpu = KINDS[kind], torch.device("cpu")
    tokens = make_tokens(900, group=group, head_size=head_size).to(dtype)
    rules = make_rules(settings, head_size=head_size)
    memory = make_memory(settings, 2, head_size=head_size, dtype=dtype)
    there = Memory(memory.raw.clone().to(device), memory.format)
    state = rules.state
    if isinstance(state, SlopeState):
        state = SlopeState(state.directions.to(device), state.scale)
    cuts = [300, 301, 880]
    expected = serve(TORCH, rules, tokens, cuts, memory, cpu)
    actual = serve(cuda.kernels(multiprocessors(device)), replace(rules, state=state), tokens, cuts, there, device)
    assert actual.isfinite().all()
    if settings.select == "random" or dtype == torch.float32:
        kept = [kept_positions(each, 900, 1).cpu() for each in (memory, there)]
        # A near tie of two recall errors can fall the other way where sums come in another order.
        assert (kept[0] != kept[1]).float().mean() < 0.05
    assert relative_error(actual, expected) < ROUNDING[dtype]
    assert (there.raw[0] == 0xFF).all()
