"""Start-up of models in which layers with a sliding window stand beside full attention."""

from typing import Any

import pytest
from engines import tiny_gemma3
from startup import sentence, start

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.integration.checks import check_model
from vllm_lrqk.integration.settings import engine_of
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

FULL_LAYERS = 2
HOST_PAGE = FULL_LAYERS * 2 * 64 * 2 * 64 * 4
LRQK_PAGE = {"page_size": 64, "rank": 8}


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_gemma3(models)


def test_windows_take_block_ids_behind_the_host_pages(model: Any) -> None:
    config = start(model, {**LRQK_PAGE, "host_memory_gib": 0.25}, max_num_seqs=4, max_num_batched_tokens=512)
    engine = engine_of(config)
    assert engine.heads == FULL_LAYERS * 2
    assert engine.windows.blocks.start == engine.num_host_pages
    plan, cache = engine.windows.plan, config.cache_config
    assert len(engine.windows.blocks) == plan.blocks_for(4, config.max_in_flight_tokens)
    assert engine.num_host_pages == ((1 << 28) - len(engine.windows.blocks) * plan.block_bytes) // HOST_PAGE
    assert cache.kv_cache_memory_bytes == engine.windows.blocks.stop * plan.block_bytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pipeline_parallel_size": 2}, ["--pipeline-parallel-size", "2", "set it to 1"]),
        ({"disable_hybrid_kv_cache_manager": True}, ["--disable-hybrid-kv-cache-manager", "leave it out"]),
        ({"num_gpu_blocks_override": 30}, ["--num-gpu-blocks-override", "30", "--max-num-seqs"]),
        ({"attention_backend": "LOLA", "additional_config": {}}, ["LOLA", "sliding-window layers", "another"]),
        (
            {"hf_overrides": {"layer_types": ["full_attention", "sliding_attention", "chunked_attention"] * 2}},
            ["'chunked_attention'", "another attention backend"],
        ),
    ],
)
def test_what_is_refused(model: Any, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        start(model, LRQK_PAGE, **settings)
    assert all(word in sentence(error) for word in words), sentence(error)


def test_a_gpu_is_refused(model: Any) -> None:
    config = start(model, LRQK_PAGE)
    config.device_config.device_type = "cuda"
    with pytest.raises(ConfigError, match=r"^LRQK serves sliding-window layers on the CPU platform only, .*\.$"):
        check_model(config, LRQK(LRQKSettings(), "cuda"))
