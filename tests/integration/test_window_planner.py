"""What vLLM's own planner makes of windows beside factor pages, for models far too large to be loaded here."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_lrqk.core.windows import WindowLayers, plan_windows
from vllm_lrqk.integration.blocks import page_spec
from vllm_lrqk.integration.window_blocks import window_spec
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

TOKENS = 131_072
DTYPE = torch.bfloat16
MODELS = {
    "Gemma 3 270M": (["window"] * 5 + ["full"], 18, 1, 256, 512),
    "Gemma 3 27B": (["window"] * 5 + ["full"], 62, 16, 128, 1024),
    "gpt-oss-20b": (["window", "full"], 24, 8, 64, 128),
}
"""Pattern of the layers, their number, KV heads, head size, window."""


def planned(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """The package's plan, vLLM's groups, and the spec of every layer."""
    pattern, layers, kv_heads, head_size, window = MODELS[name]
    kinds = [pattern[layer % len(pattern)] for layer in range(layers)]
    memory = LRQK(LRQKSettings(), "cpu").plan(head_size, DTYPE, 1)
    page_bytes = kinds.count("full") * kv_heads * memory.block_bytes
    own = WindowLayers(window, kinds.count("window"), kv_heads * 2 * head_size * DTYPE.itemsize)
    plan = plan_windows(own, page_bytes, memory.block_size)
    full = page_spec(memory, kv_heads, head_size, 1000)
    narrow = window_spec(window, plan.block_size, kv_heads, head_size, DTYPE, range(1000, 2000))
    specs = {f"layers.{layer}.attn": full if kind == "full" else narrow for layer, kind in enumerate(kinds)}
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.BLHNC),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        attention_config=SimpleNamespace(hisparse_config=None),
    )
    return plan, kv_cache_utils.get_kv_cache_groups(config, specs), specs


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_blocks_are_those_that_the_package_counts_with(name: str) -> None:
    plan, groups, specs = planned(name)
    windows = [group for group in groups if "first_block" in str(group.kv_cache_spec)]
    assert len(windows) == plan.groups
    assert len(groups) == plan.groups + 1
    assert kv_cache_utils._get_kv_cache_bytes_per_block(groups, KVCacheLayout.BLHNC) == plan.block_bytes
    assert sorted(layer for group in groups for layer in group.layer_names) == sorted(specs)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_of_a_long_request_are_little_more_than_its_layers_need(name: str) -> None:
    plan, _, specs = planned(name)
    pages = [spec for spec in specs.values() if not hasattr(spec, "first_block")]
    blocks = -(-TOKENS // pages[0].block_size)
    taken = (blocks + plan.blocks_of(plan.window)) * plan.block_bytes
    needed = blocks * sum(spec.page_size_bytes for spec in pages) + plan.layers * plan.window * plan.bytes_per_token
    assert taken < 1.1 * needed, taken / needed
