"""Memory, NUMA nodes and checkpoints that do not suit end start-up with one sentence; what is shared is shared."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from engines import tiny_llama
from startup import sentence, start

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import GIB, HostMemory
from vllm_lrqk.integration import compat, settings, startup
from vllm_lrqk.integration.checks import check_model
from vllm_lrqk.integration.machine import check_host_share
from vllm_lrqk.methods.lola.method import Lola
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_llama(models, 8, 2, 64)


@pytest.fixture
def ten_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory(10 * GIB, "the control group /job")
    monkeypatch.setattr(startup, "host_memory", lambda: memory)
    monkeypatch.setattr(settings, "free_host_memory", lambda: memory.free_bytes)


def host_bytes(config: Any) -> int:
    return config.additional_config.engine.host.memory_bytes


def test_share_of_the_free_memory() -> None:
    memory = HostMemory(10 * GIB, "the system")
    check_host_share(8, 0, memory, "lrqk.host_memory_gib")
    with pytest.raises(
        ConfigError, match=r"host_memory_gib is 9, but 10 GiB are free by the count of the system, .* 80% .* it to 8\.$"
    ):
        check_host_share(9, 0, memory, "lrqk.host_memory_gib")
    with pytest.raises(ConfigError, match=r"is 6 \(9 GiB with what lies beside it\), .* lower it to 5\.33\.$"):
        check_host_share(6, 3 * GIB, memory, "lrqk.host_memory_gib")


@pytest.mark.parametrize("asked", [9.0, 1000.0])
def test_more_memory_than_there_is(model: Any, ten_gib: None, asked: float) -> None:
    with pytest.raises(ValueError) as error:
        start(model, {"host_memory_gib": asked})
    assert all(word in sentence(error) for word in (f"lrqk.host_memory_gib is {asked:g}", "/job", "80%", "lower it"))
    lower = float(sentence(error).rpartition("lower it to ")[2].rstrip("."))
    assert lower < 8
    start(model, {"host_memory_gib": lower})


def test_engines_of_one_host_share_its_memory(model: Any, ten_gib: None) -> None:
    alone = start(model, {"host_memory_gib": 4})
    parallel = {"data_parallel_size": 2, "data_parallel_size_local": 2}
    assert host_bytes(start(model, {"host_memory_gib": 4}, **parallel)) == host_bytes(alone) // 2 == 2 * GIB
    assert host_bytes(start(model, **parallel)) == host_bytes(start(model)) // 2 == 10 * GIB // 4


def test_ranks_need_numa_nodes(model: Any, ten_gib: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "cpu_memory_nodes", lambda: [0])
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    with pytest.raises(ValueError) as error:
        start(model, tensor_parallel_size=2)
    assert all(word in sentence(error) for word in ("2 ranks", "1 NUMA node,", "VLLM_CPU_OMP_THREADS_BIND=nobind"))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert host_bytes(start(model, tensor_parallel_size=2)) == 10 * GIB // 4
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    monkeypatch.setattr(compat, "cpu_memory_nodes", lambda: [0, 1])
    start(model, tensor_parallel_size=2)


FP8 = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": []} | FP8


def test_a_checkpoint_with_quantised_keys(model: Any) -> None:
    quantised = {"hf_overrides": {"quantization_config": COMPRESSED}, "dtype": "bfloat16"}
    with pytest.raises(ValueError) as error:
        start(model, **quantised)
    assert all(word in sentence(error) for word in ("--kv-cache-dtype is auto", "scales", "--kv-cache-dtype bfloat16"))
    start(model, **quantised, kv_cache_dtype="bfloat16")


@pytest.mark.parametrize("method", [LRQK(LRQKSettings(), "cuda"), Lola(LolaSettings(), "cuda")], ids=["LRQK", "LOLA"])
def test_sleep_mode_is_refused_on_a_gpu(model: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(method), "check_machine", lambda self: None)
    config = start(model)
    config.device_config.device_type = "cuda"
    check_model(config, method)
    config.model_config.enable_sleep_mode = True
    with pytest.raises(
        ConfigError, match=r"^\w+ does not support sleep mode \(--enable-sleep-mode\): leave it out.*\.$"
    ):
        check_model(config, method)


def test_layers_with_different_kv_heads(model: Any, ten_gib: None) -> None:
    """Both tiers are sized by what the layers take together."""

    def blocks(config: Any) -> Any:
        attention = (SimpleNamespace(no_op=False, n_heads_in_group=group) for group in (4, 2))
        config.block_configs = [SimpleNamespace(attention=own) for own in attention]
        return config

    plain, mixed = start(model, {"host_memory_gib": 0.25}), None
    mixed = start(model, {"host_memory_gib": 0.25}, hf_overrides=blocks)
    engine = mixed.additional_config.engine
    assert plain.additional_config.engine.heads == 2 + 2
    assert engine.heads == 2 + 4
    assert engine.host.page_bytes == 6 * 256 * 2 * 64 * 4
    assert host_bytes(mixed) == GIB // 4
    pool = mixed.cache_config.kv_cache_memory_bytes
    assert pool == engine.host.num_pages * 6 * engine.plan(mixed).block_bytes
    assert json.dumps(mixed.additional_config) == '{"lrqk": {"host_memory_gib": 0.25}}'


def test_vllms_own_figures_are_ours(model: Any, ten_gib: None) -> None:
    """What vLLM logs and shows in `cache_config_info` is what the start-up line says."""
    from vllm.v1.core import kv_cache_utils

    import vllm_lrqk.integration.blocks  # noqa: F401  wraps it

    config = start(model, {"host_memory_gib": 0.25, "hot_cache": True})
    block_bytes = config.additional_config.engine.capacity(config, 1).block_bytes
    num_blocks = config.cache_config.kv_cache_memory_bytes // block_bytes
    kv_cache_utils.update_kv_cache_capacity(config, SimpleNamespace(num_blocks=num_blocks))
    tokens, line = config.cache_config.kv_cache_size_tokens, startup.start_line(config, "torch", num_blocks)
    assert line.startswith("LRQK (lrqk factors, torch kernels): ")
    assert f"room for {tokens:,} tokens" in line
    assert config.cache_config.kv_cache_max_concurrency == tokens / 2048
    assert tokens == config.additional_config.engine.host.num_pages * 256 - 256
