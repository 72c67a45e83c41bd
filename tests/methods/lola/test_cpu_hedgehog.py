"""LoLA's CPU kernels for the hedgehog state against the plain torch form."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, relative_error
from lola_cases import Tokens, kept_positions, make_maps, make_memory, make_rules, make_tokens

from vllm_lrqk.methods.lola.dispatch import force_kernels
from vllm_lrqk.methods.lola.feature_maps import FeatureMaps
from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.settings import LolaSettings

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# As in test_cpu.py; features are exponentials too, and enter twice.
ROUNDING = {torch.float32: 3e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SETTINGS = LolaSettings(window=32, chunk=16, cache=41, sink_tokens=3, state="hedgehog", feature_maps="file")


def maps_of(tokens: Tokens, features: int = 64, **kind: bool) -> FeatureMaps:
    """Features that are neither even nor one-hot."""
    kv_heads, head_size = tokens.key.shape[1:]
    maps = make_maps(kv_heads, tokens.query.shape[1] // kv_heads, head_size, features=features, **kind)
    size = 2 * head_size**-0.5
    return replace(maps, query=size * maps.query, key=size * maps.key)


def run(
    name: str,
    tokens: Tokens,
    maps: FeatureMaps,
    cuts: tuple[int, ...] = (),
    decode_from: int | None = None,
    settings: LolaSettings = SETTINGS,
) -> tuple[torch.Tensor, Memory]:
    """Output of a prompt in pieces and of single tokens after it, and the memory."""
    length, _, head_size = tokens.key.shape
    end = length if decode_from is None else decode_from
    heads, features = len(maps.key), maps.num_features // 2
    memory = make_memory(settings, 3, heads, head_size, tokens.key.dtype, features=features)
    rules = make_rules(settings, heads, head_size, maps)
    output = torch.full_like(tokens.query, torch.nan)
    block = torch.tensor([1], dtype=torch.int32)
    with force_kernels(name) as kernels:
        for start, stop in pairwise([0, *cuts, end]):
            part = tokens[start:stop]
            kernels.prefill_attention(part.query, part.key, part.value, memory, 1, start, rules, output[start:stop])
        for i in range(end, length):
            part, lens = tokens[i : i + 1], torch.tensor([i + 1], dtype=torch.int32)
            kernels.decode_attention(part.query, part.key, part.value, memory, block, lens, rules, output[i : i + 1])
    return output, memory


def check(
    name: str,
    tokens: Tokens,
    maps: FeatureMaps,
    cuts: tuple[int, ...] = (),
    decode_from: int | None = None,
    settings: LolaSettings = SETTINGS,
) -> None:
    expected, reference = run("torch", tokens, maps, cuts, decode_from, settings)
    output, memory = run(name, tokens, maps, cuts, decode_from, settings)
    length = len(tokens.key)
    assert relative_error(output, expected) < ROUNDING[tokens.query.dtype]
    assert torch.equal(kept_positions(memory, length, 1), kept_positions(reference, length, 1))
    if settings.folded(settings.updates(length)):
        for sum_name, tensor in reference.sums.items():
            assert relative_error(memory.sums[sum_name][1], tensor[1]) < 1e-4, sum_name
    assert (memory.raw[[0, 2]] == 0xFF).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestAgainstTorch:
    @pytest.mark.parametrize("length", [1, 48, 49, 96, 97, 98, 112, 113, 500])
    def test_lengths(self, name: str, length: int) -> None:
        """The cache is full and the first tokens are folded with token 81."""
        tokens = make_tokens(length, head_size=64)
        check(name, tokens, maps_of(tokens))

    @pytest.mark.parametrize("with_kappa", [True, False])
    @pytest.mark.parametrize("per_query_head", [True, False])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_kinds_and_types(self, name: str, dtype: torch.dtype, per_query_head: bool, with_kappa: bool) -> None:
        tokens = make_tokens(263, head_size=64).to(dtype)
        maps = maps_of(tokens, with_kappa=with_kappa, per_query_head=per_query_head)
        check(name, tokens, maps, (70, 71, 150), 200)

    @pytest.mark.parametrize(("head_size", "features"), [(64, 32), (96, 96), (128, 160)])
    @pytest.mark.parametrize("group", [1, 4, 7])
    def test_heads_and_features(self, name: str, group: int, head_size: int, features: int) -> None:
        tokens = make_tokens(250, kv_heads=3, group=group, head_size=head_size)
        check(name, tokens, maps_of(tokens, features), (100,), 230)

    @pytest.mark.parametrize("change", [{"cache": 0, "sink_tokens": 0}, {"select": "random"}, {"window": 16}], ids=str)
    def test_settings(self, name: str, change: dict) -> None:
        """The last with more spans than a pass has snapshots."""
        tokens = make_tokens(600, head_size=64)
        check(name, tokens, maps_of(tokens), (333,), settings=replace(SETTINGS, **change))

    @pytest.mark.parametrize("with_kappa", [True, False])
    def test_cuts_and_threads_give_the_same_bits(self, name: str, with_kappa: bool) -> None:
        tokens = make_tokens(400, group=4, head_size=64)  # the ring is full
        maps = maps_of(tokens, with_kappa=with_kappa)
        threads, results = torch.get_num_threads(), []
        try:
            for count, cuts in ((1, ()), (2, (10, 11, 49, 100, 257, 399)), (3, tuple(range(7, 400, 7)))):
                torch.set_num_threads(count)
                output, memory = run(name, tokens, maps, cuts)
                results.append((output, memory.raw))
            single, memory = run(name, tokens, maps, decode_from=0)
        finally:
            torch.set_num_threads(threads)
        for output, raw in results[1:]:
            assert torch.equal(output, results[0][0])
            assert torch.equal(raw, results[0][1])
        assert torch.equal(memory.raw, results[0][1])
        assert relative_error(single, results[0][0]) < ROUNDING[torch.float32]

    def test_large_queries_stay_finite(self, name: str) -> None:
        tokens = make_tokens(300, head_size=64)
        output, _ = run(name, replace(tokens, query=100 * tokens.query), maps_of(tokens), (), 250)
        assert output.isfinite().all()


def test_features_that_fill_no_vector_take_the_torch_form() -> None:
    tokens = make_tokens(200, head_size=64)
    maps = maps_of(tokens, 6)
    assert torch.equal(run(INSTRUCTION_SETS[0], tokens, maps, (), 150)[0], run("torch", tokens, maps, (), 150)[0])
