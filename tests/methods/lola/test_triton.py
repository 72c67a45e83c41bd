"""LoLA's Triton kernels, interpreted on the CPU, against the plain torch form."""

from itertools import pairwise

import pytest
import torch
from cpu_kernel_cases import relative_error
from interpreted import interpreted_kernels
from lola_cases import Tokens, kept_positions, make_memory, make_rules, make_tokens

from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.kernels import TORCH, Kernels
from vllm_lrqk.methods.lola.settings import LolaSettings

cuda = interpreted_kernels("methods.lola.cuda")

# Float32 sums come in another order; the interpreter rounds to bfloat16 by cutting bits off, a unit in the last place.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
HEAD_SIZE = 16


def lola(**values) -> LolaSettings:
    return LolaSettings(**{"window": 32, "chunk": 16, "cache": 41, "sink_tokens": 3, "state_rank": 8} | values)


KINDS = {
    "slope": lola(),
    "random": lola(select="random"),
    "none": lola(state="none"),
    "no cache": lola(cache=0, sink_tokens=0),
    "odd": lola(window=48, chunk=32, cache=7, state_rank=12),
}


def run(kernels: Kernels, rules: Rules, tokens: Tokens, cuts: list[int], memory: Memory) -> torch.Tensor:
    """A prompt in pieces, and single tokens from the last cut on."""
    output, block = torch.full_like(tokens.query, torch.nan), torch.tensor([1], dtype=torch.int32)
    for start, end in pairwise([0, *cuts]):
        part = tokens[start:end]
        kernels.prefill_attention(part.query, part.key, part.value, memory, block[0], start, rules, output[start:end])
    for i in range(cuts[-1], len(tokens.key)):
        part, lens = tokens[i : i + 1], torch.tensor([i + 1], dtype=torch.int32)
        kernels.decode_attention(part.query, part.key, part.value, memory, block, lens, rules, output[i : i + 1])
    return output


def check(settings: LolaSettings, tokens: Tokens, cuts: list[int], multiprocessors: int = 4) -> None:
    length, kv_heads, head_size = tokens.key.shape
    rules = make_rules(settings, kv_heads, head_size)
    memories = [make_memory(settings, 2, kv_heads, head_size, tokens.key.dtype) for _ in range(2)]
    expected = run(TORCH, rules, tokens, cuts, memories[0])
    output = run(cuda.kernels(multiprocessors), rules, tokens, cuts, memories[1])
    assert output.isfinite().all()
    assert relative_error(output, expected) < ROUNDING[tokens.query.dtype]
    assert torch.equal(kept_positions(memories[1], length, 1), kept_positions(memories[0], length, 1))
    cached = settings.cached(settings.updates(length))
    assert torch.equal(memories[1].cache[1, :, :cached], memories[0].cache[1, :, :cached])
    if settings.folded(settings.updates(length)):
        for name, tensor in memories[0].sums.items():
            # Moments cancel where values do not follow keys.
            assert relative_error(memories[1].sums[name][1], tensor[1]) < 1e-4, name
    assert (memories[1].raw[0] == 0xFF).all()


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_single_tokens(kind):
    check(KINDS[kind], make_tokens(170), [70, 71, 150])


@pytest.mark.parametrize("length", [1, 48, 49, 97, 113])
def test_lengths(length):
    check(lola(), make_tokens(length, kv_heads=1), [max(1, length - 2)])


@pytest.mark.parametrize("group", [1, 3, 8])
def test_groups_and_head_sizes(group):
    check(lola(), make_tokens(130, kv_heads=1, group=group, head_size=24), [128])


def test_bfloat16():
    check(lola(), make_tokens(150).to(torch.bfloat16), [149])


def test_batch_with_padding():
    settings, lengths = lola(), [49, 1, 0, 113]
    rules, memory = make_rules(settings), make_memory(settings, 5)
    requests = [make_tokens(max(length, 1), seed=length) for length in lengths]
    blocks = torch.tensor([3, 0, 1, 4], dtype=torch.int32)
    expected = []
    for block, length, tokens in zip(blocks, lengths, requests):
        alone, own = make_memory(settings, 5), torch.zeros_like(tokens.query)
        if length:
            part, rest = (length - 1, tokens[: length - 1])
            for each in (alone, memory):
                TORCH.prefill_attention(rest.query, rest.key, rest.value, each, block, 0, rules, own[:part])
            last, lens = tokens[part:], torch.tensor([length], dtype=torch.int32)
            TORCH.decode_attention(last.query, last.key, last.value, alone, block[None], lens, rules, own[part:])
        expected.append(own[-1])
    last = [tokens[-1:] for tokens in requests]
    query, key, value = (torch.cat([getattr(part, field) for part in last]) for field in ("query", "key", "value"))
    output = torch.full_like(query, torch.nan)
    lens = torch.tensor(lengths, dtype=torch.int32)
    cuda.kernels(1).decode_attention(query, key, value, memory, blocks, lens, rules, output)
    assert torch.allclose(output, torch.stack(expected), atol=1e-5)
    assert (memory.raw[[1, 2]] == 0xFF).all()
