"""What LoLA tells vLLM's part of the package: its memory and its refusals."""

import pytest
import torch
from lola_cases import make_maps
from safetensors.torch import save_file

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.methods import METHODS, method_class
from vllm_lrqk.methods.lola.method import Lola
from vllm_lrqk.methods.lola.settings import LolaSettings

SMALL_MODEL = ModelFacts("small", head_size=16, heads=4, kv_heads=2, max_model_len=1 << 20, config={})


def test_it_is_a_method_of_the_package():
    assert "LOLA" in METHODS
    assert method_class("LOLA") is Lola


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", [0, 5, 236])
def test_a_request_owns_one_block_with_all_of_its_memory(dtype, cache):
    settings = LolaSettings(cache=cache, sink_tokens=0)
    plan = Lola(settings, "cpu").plan(128, dtype, 4)
    assert (plan.is_paged, plan.blocks_per_request, plan.host_bytes_per_token) == (False, 1, 0)
    rows = (settings.ring_rows + cache) * 2 * 128 * dtype.itemsize
    state = (2 * 128 + 16 * 128 + 16 * 16) * 4
    assert rows + state <= plan.block_bytes < rows + state + cache * 4 + 7 * 64


def test_maps_per_query_head_take_a_memory_each(tmp_path):
    sizes = {}
    for per_query_head in (False, True):
        maps, path = make_maps(per_query_head=per_query_head), tmp_path / f"{per_query_head}.safetensors"
        save_file({"layers.0.query_map": maps.query, "layers.0.key_map": maps.key}, path)
        method = Lola(LolaSettings(state="hedgehog", feature_maps=str(path)), "cpu")
        method.check(SMALL_MODEL)
        sizes[per_query_head] = method.plan(16, torch.float32, 2).block_bytes
    assert sizes[True] == 2 * sizes[False]


def test_refusals():
    with pytest.raises(ConfigError, match=r"^lola\.state_rank is 32, .* head size, 16\.$"):
        Lola(LolaSettings(state_rank=32), "cpu").check(SMALL_MODEL)
    with pytest.raises(ConfigError, match="there is no such file"):
        Lola(LolaSettings(state="hedgehog", feature_maps="none.pt"), "cpu").check(SMALL_MODEL)


def test_hedgehog_is_refused_on_a_gpu(tmp_path):
    maps, path = make_maps(), tmp_path / "maps.safetensors"
    save_file({"layers.0.query_map": maps.query, "layers.0.key_map": maps.key}, path)
    with pytest.raises(ConfigError, match="only the CPU platform serves it"):
        Lola(LolaSettings(state="hedgehog", feature_maps=str(path)), "cuda").check(SMALL_MODEL)
