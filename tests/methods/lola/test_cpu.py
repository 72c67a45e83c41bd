"""LoLA's compiled CPU kernels against the plain torch form."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, relative_error
from lola_cases import Tokens, kept_positions, make_memory, make_rules, make_tokens

from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.dispatch import force_kernels
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.settings import LolaSettings

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# The output is rounded to its dtype: half a unit in the last place, twice where two roundings differ. Float32 sums come
# in another order, and exponentials are good to 4e-6.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def lola(**values) -> LolaSettings:
    return LolaSettings(**{"window": 32, "chunk": 16, "cache": 41, "sink_tokens": 3, "state_rank": 8} | values)


KINDS = {
    "slope": lola(),
    "random": lola(select="random"),
    "none": lola(state="none"),
    "no cache": lola(cache=0, sink_tokens=0),
    "odd": lola(window=48, chunk=32, cache=7, state_rank=12),
}


def run(
    name: str, rules: Rules, tokens: Tokens, cuts: list[int], decode_from: int, memory: Memory, block: int = 1
) -> torch.Tensor:
    """Output of a prompt in pieces and of single tokens after it."""
    output = torch.full_like(tokens.query, torch.nan)
    with force_kernels(name) as kernels:
        for start, end in pairwise([0, *cuts, decode_from]):
            part = tokens[start:end]
            kernels.prefill_attention(part.query, part.key, part.value, memory, block, start, rules, output[start:end])
        blocks = torch.tensor([block], dtype=torch.int32)
        for i in range(decode_from, len(tokens.key)):
            part, lens = tokens[i : i + 1], torch.tensor([i + 1], dtype=torch.int32)
            kernels.decode_attention(part.query, part.key, part.value, memory, blocks, lens, rules, output[i : i + 1])
    return output


def memory_for(settings: LolaSettings, tokens: Tokens, blocks: int = 3) -> Memory:
    _, kv_heads, head_size = tokens.key.shape
    return make_memory(settings, blocks, kv_heads, head_size, tokens.key.dtype)


def check(
    name: str, settings: LolaSettings, tokens: Tokens, cuts: list[int] | None = None, decode_from: int | None = None
) -> None:
    """Outputs, kept positions, sums and bytes that must stay as they are."""
    length, kv_heads, head_size = tokens.key.shape
    rules = make_rules(settings, kv_heads, head_size)
    memories = {each: memory_for(settings, tokens) for each in ("torch", name)}
    end = length if decode_from is None else decode_from
    outputs = {each: run(each, rules, tokens, cuts or [], end, memory) for each, memory in memories.items()}
    assert outputs[name].isfinite().all()
    assert relative_error(outputs[name], outputs["torch"]) < ROUNDING[tokens.query.dtype]
    expected, actual = memories["torch"], memories[name]
    assert torch.equal(kept_positions(actual, length, 1), kept_positions(expected, length, 1))
    cached = settings.cached(settings.updates(length))
    assert torch.equal(actual.cache[1, :, :cached], expected.cache[1, :, :cached])
    in_ring = torch.arange(settings.updates(length) * settings.chunk, length) % settings.ring_rows
    assert torch.equal(actual.ring[1, :, in_ring], expected.ring[1, :, in_ring])
    if settings.folded(settings.updates(length)):
        for sum_name, tensor in expected.sums.items():
            # Moments cancel where values do not follow keys.
            assert relative_error(actual.sums[sum_name][1], tensor[1]) < 1e-4, sum_name
    assert (actual.raw[[0, 2]] == 0xFF).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestAgainstTorch:
    @pytest.mark.parametrize("length", [1, 2, 47, 48, 49, 63, 64, 65, 96, 97, 111, 112, 113, 500])
    def test_lengths(self, name: str, length: int) -> None:
        """The first chunk leaves with token 49; the cache is full and the first tokens are folded with the third."""
        check(name, lola(), make_tokens(length, head_size=64))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kinds_and_types(self, name: str, kind: str, dtype: torch.dtype) -> None:
        check(name, KINDS[kind], make_tokens(263, head_size=64).to(dtype), [70, 71, 150], 200)

    @pytest.mark.parametrize("head_size", [64, 96, 128])
    @pytest.mark.parametrize("group", [1, 4, 7, 8])
    def test_heads(self, name: str, head_size: int, group: int) -> None:
        tokens = make_tokens(250, kv_heads=3, group=group, head_size=head_size)
        check(name, lola(), tokens, [100], 230)

    def test_default_settings(self, name: str) -> None:
        tokens = make_tokens(1500, head_size=128).to(torch.bfloat16)
        check(name, LolaSettings(), tokens, [256, 257, 900], 1400)

    def test_many_spans_in_one_piece(self, name: str) -> None:
        """More than one pass of snapshots."""
        check(name, lola(window=16), make_tokens(16 * 140, group=1, head_size=64), [333])

    def test_strided_arguments(self, name: str) -> None:
        settings, tokens = lola(), make_tokens(200, head_size=64)
        rules = make_rules(settings, head_size=64)
        expected = run(name, rules, tokens, [], 150, memory_for(settings, tokens))
        heads = tokens.query.shape[1]
        wide = torch.full((200, 3 * heads, 64), torch.nan)
        wide[:, :heads], wide[:, heads : heads + 2], wide[:, heads + 2 : heads + 4] = (
            tokens.query,
            tokens.key,
            tokens.value,
        )
        strided = Tokens(wide[:, :heads], wide[:, heads : heads + 2], wide[:, heads + 2 : heads + 4])
        memory = memory_for(settings, tokens)
        raw = torch.full((3, 4, memory.format.block_bytes), 0xFF, dtype=torch.uint8)
        output = run(name, rules, strided, [], 150, Memory(raw[:, 1:3], memory.format))
        assert torch.equal(output, expected)
        assert (raw[:, [0, 3]] == 0xFF).all()

    def test_decode_batch(self, name: str) -> None:
        """Requests of a batch give the bits that they give alone; one of length 0 gives zeros."""
        settings = lola()
        lengths, rules = [49, 1, 0, 333, 113], make_rules(settings, head_size=64)
        requests = [make_tokens(max(length, 1), head_size=64, seed=length) for length in lengths]
        memory = memory_for(settings, requests[0], blocks=6)
        blocks = torch.tensor([3, 0, 5, 4, 1], dtype=torch.int32)
        alone = []
        for block, length, tokens in zip(blocks.tolist(), lengths, requests):
            if length == 0:
                alone.append(torch.zeros_like(tokens.query[0]))
                continue
            alone.append(run(name, rules, tokens, [], length - 1, memory_for(settings, tokens))[-1])
            run(name, rules, tokens[: length - 1], [], length - 1, memory, block)
        last = [tokens[-1:] for tokens in requests]
        query, key, value = (torch.cat([getattr(part, field) for part in last]) for field in ("query", "key", "value"))
        output = torch.full_like(query, torch.nan)
        lens = torch.tensor(lengths, dtype=torch.int32)
        with force_kernels(name) as kernels:
            kernels.decode_attention(query, key, value, memory, blocks, lens, rules, output)
        assert torch.equal(output, torch.stack(alone))
        assert (memory.raw[[2, 5]] == 0xFF).all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_cuts_and_threads_give_the_same_bits(self, name: str, dtype: torch.dtype) -> None:
        settings, tokens = lola(), make_tokens(400, group=4, head_size=64).to(dtype)  # the ring is full
        rules = make_rules(settings, head_size=64)
        threads, results = torch.get_num_threads(), []
        try:
            for count, cuts in ((1, []), (2, []), (3, [10, 11, 49, 100, 257, 399]), (2, list(range(7, 400, 7)))):
                torch.set_num_threads(count)
                memory = memory_for(settings, tokens)
                results.append((run(name, rules, tokens, cuts, 400, memory), memory.raw))
        finally:
            torch.set_num_threads(threads)
        for output, raw in results[1:]:
            assert torch.equal(output, results[0][0])
            assert torch.equal(raw, results[0][1])

    def test_single_tokens_leave_the_same_memory(self, name: str) -> None:
        """Decoding from the first token on; outputs differ from prefill's by the order of sums alone.

        304 tokens just fill the ring, so that no row of it is left over."""
        settings, tokens = lola(), make_tokens(304, head_size=64)
        rules = make_rules(settings, head_size=64)
        memories = [memory_for(settings, tokens) for _ in range(2)]
        whole = run(name, rules, tokens, [], 304, memories[0])
        single = run(name, rules, tokens, [], 0, memories[1])
        assert torch.equal(memories[0].raw, memories[1].raw)
        assert relative_error(single, whole) < ROUNDING[torch.float32]

    def test_equal_scores_keep_the_older(self, name: str) -> None:
        tokens = make_tokens(300, head_size=64)
        tokens.value[:] = 1.0
        settings = lola(state="none", sink_tokens=0)
        memory = memory_for(settings, tokens)
        run(name, make_rules(settings, head_size=64), tokens, [], 300, memory)
        assert torch.equal(kept_positions(memory, 300, 1), torch.arange(41).int().expand(2, 41))

    def test_large_queries_stay_finite(self, name: str) -> None:
        tokens = make_tokens(300, head_size=64)
        tokens = replace(tokens, query=100 * tokens.query)
        settings = lola()
        output = run(name, make_rules(settings, head_size=64), tokens, [], 250, memory_for(settings, tokens))
        assert output.isfinite().all()

    def test_a_block_taken_over_gives_the_same_bits(self, name: str) -> None:
        settings = lola()
        rules, memory = make_rules(settings, head_size=64), make_memory(settings, 3, 2, 64, fill=0x7F)
        run(name, rules, make_tokens(333, head_size=64, seed=5), [], 300, memory)
        tokens = make_tokens(200, head_size=64)
        again = run(name, rules, tokens, [90], 150, memory)
        assert torch.equal(again, run(name, rules, tokens, [90], 150, memory_for(settings, tokens)))


def test_other_head_sizes_and_mixed_types_take_the_torch_form() -> None:
    settings = lola()
    for tokens in (make_tokens(120, head_size=20), make_tokens(120, head_size=64)):
        rules = make_rules(settings, head_size=tokens.key.shape[2])
        memory = make_memory(settings, 3, 2, tokens.key.shape[2], torch.bfloat16)
        tokens = replace(tokens, key=tokens.key.bfloat16(), value=tokens.value.bfloat16())
        output = run(INSTRUCTION_SETS[0], rules, tokens, [], 100, memory)
        expected = run("torch", rules, tokens, [], 100, memory)
        assert torch.equal(output, expected)
