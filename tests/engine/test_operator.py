"""What an operator sees of an engine whose layers differ: one start-up line, counters and series of all of them."""

import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from engines import counters, engine, greedy, scheduler, tiny_llama, token_prompts

pytestmark = pytest.mark.engine

PAGE, HEADS, HEAD_SIZE, KV_HEADS = 64, 8, 80, (2, 4)
SETTINGS = {"page_size": PAGE, "rank": 8, "top_k": 2048, "hot_cache": True, "host_memory_gib": 0.25}
LENGTHS, TOKENS = [50, 130], 6


def two_kinds(config: Any) -> Any:
    """Nemotron's way to say that layers have different KV heads."""
    config.architectures = ["DeciLMForCausalLM"]
    ffn = SimpleNamespace(no_op=False, intermediate_size=128, hidden_act="silu")
    groups = (HEADS // count for count in KV_HEADS)
    config.block_configs = [
        SimpleNamespace(attention=SimpleNamespace(no_op=False, n_heads_in_group=group), ffn=ffn) for group in groups
    ]
    return config


def series(name: str) -> dict[str, Any]:
    """Samples of a metric in the default registry, which vLLM's `/metrics` shows."""
    from prometheus_client import REGISTRY

    return {
        sample.name: sample
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith(f"vllm:lrqk_{name}")
    }


def test_layers_with_different_kv_heads(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_lrqk.integration import report

    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(report.logger, level, lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(report, "PUBLISH_SECONDS", 0.05)
    model = tiny_llama(models, HEADS, 2, HEAD_SIZE)
    with engine(model, SETTINGS, hf_overrides=two_kinds, load_format="dummy", max_model_len=512) as llm:
        start = [line for line in lines if "device bytes" in line]
        before = counters(llm)
        greedy(llm, token_prompts(LENGTHS), TOKENS)
        counted = counters(llm)
        cache, manager = llm.llm_engine.vllm_config.cache_config, scheduler(llm).kv_cache_manager
        deadline = time.monotonic() + 20
        while not series("rows_attended") or series("rows_attended")["vllm:lrqk_rows_attended_total"].value < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        shown, pages = series(""), manager.block_pool.num_gpu_blocks - 1
        # What vLLM runs to warm up, here once more, is not counted.
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.compile_or_warm_up_model()
        assert counters(llm)["decode_tokens"] == counters(llm)["rows_attended"] == 0

    assert len(start) == 1, start
    device, host, room, host_room, *_ = [
        int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", start[0].partition("kernels):")[2])
    ]
    assert host == counted["host_bytes_per_token"] == sum(KV_HEADS) * 2 * HEAD_SIZE * 4
    assert device == counted["device_bytes_per_token"]
    assert device % sum(KV_HEADS) == 0
    assert room == host_room == (2**28 // (host * PAGE) - 1) * PAGE
    assert cache.kv_cache_size_tokens == room  # vLLM's own log and cache_config_info
    assert "cpu-avx2" in start[0] or "torch" in start[0]  # 80 does not fill AVX-512's vectors
    if "cpu-avx2" in start[0]:
        assert any("head size 80 does not fill the vectors of cpu-avx512" in line for line in lines)

    assert before["decode_tokens"] == before["rows_attended"] == 0
    lengths = [length + step for length in LENGTHS for step in range(1, TOKENS)]
    assert counted["decode_tokens"] == len(lengths) * len(KV_HEADS)
    assert counted["rows_attended"] == sum(lengths) * sum(KV_HEADS)  # the selection covers everything

    for name in ("decode_tokens", "rows_attended", "rows_hit", "rows_missed", "bytes_fetched", "pages_sealed"):
        sample = shown[f"vllm:lrqk_{name}_total"]
        assert sample.value == counted[name], name
        assert sample.labels == {"model_name": str(model), "engine": "0"}
    assert shown["vllm:lrqk_host_pages_in_use"].value == 0  # no request is left
    assert shown["vllm:lrqk_host_pages_free"].value == pages == room // PAGE
