"""Settings that cannot be served end start-up with one sentence; those that can are completed."""

import pytest
from engines import tiny_llama
from startup import start
from vllm.engine.arg_utils import EngineArgs

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.integration.checks import check_layer, check_logits, check_model
from vllm_lrqk.methods.aqua.method import Aqua
from vllm_lrqk.methods.lola.method import Lola
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


def test_adaptive_budget_is_refused_off_the_cpu(model):
    config = start(model, {"top_p": 0.9})
    check_model(config, LRQK(LRQKSettings(top_p=0.9), config.device_config.device_type))
    config.device_config.device_type = "cuda"
    with pytest.raises(ConfigError, match=r"^lrqk\.top_p is 0\.9, but .*\.$"):
        check_model(config, LRQK(LRQKSettings(top_p=0.9), config.device_config.device_type))


@pytest.mark.parametrize(
    ("found", "word"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"sliding_window": 128}, "128"),
        ({"attn_type": "encoder_only"}, "encoder_only"),
        ({"kv_sharing_target": "model.layers.0"}, "model.layers.0"),
        ({"extra": {"indexer": object()}}, "indexer"),
    ],
)
def test_layers_that_cannot_be_served(found, word):
    plain = {
        "alibi_slopes": None,
        "sliding_window": None,
        "attn_type": "decoder",
        "kv_sharing_target": None,
        "extra": {},
    }
    check_layer("LRQK", **plain)
    with pytest.raises(ConfigError, match=word):
        check_layer("LRQK", **(plain | found))


@pytest.mark.parametrize(
    ("method", "device", "word"), [(Aqua, "cpu", "AQUA"), (Lola, "cpu", "LOLA"), (LRQK, "cuda", "LRQK")]
)
def test_caps_and_sinks_are_refused_where_they_are_not_served(method, device, word):
    settings = method.settings_type()
    check_logits(method(settings, device), None, None)
    for logits, what in (((30.0, None), "a soft cap of 30.0"), ((None, object()), "learned sinks")):
        with pytest.raises(ConfigError, match=rf"^{word} does not support {what}.*another attention backend\.$"):
            check_logits(method(settings, device), *logits)


def test_layers_with_caps_or_sinks_are_not_captured():
    check_logits(LRQK(LRQKSettings(), "cpu"), 30.0, object())
    with pytest.raises(ConfigError, match=r"^lrqk\.capture is 'folder', but .* leave it out\.$"):
        check_logits(LRQK(LRQKSettings(capture="folder"), "cpu"), 30.0, None)


def test_the_page_size_becomes_the_block_size(model):
    assert start(model).cache_config.block_size == 256
    assert start(model, {"page_size": 64}).cache_config.block_size == 64
    assert start(model, {"page_size": 64}, block_size=64).cache_config.block_size == 64


def test_the_pool_holds_what_the_host_tier_can_back(model):
    config = start(model, {"page_size": 64, "rank": 16, "host_memory_gib": 0.5})
    host_page = 2 * 2 * 64 * 2 * 64 * 4
    pages = (1 << 29) // host_page
    # A, X, scales, mean value, value projection, its scales and mean of A; no padding at this size
    factor_page = 2 * 2 * (64 * 16 + 16 * 64 + 64 + 128 + 16 * 64 + 64 + 64)
    assert config.cache_config.kv_cache_memory_bytes == pages * factor_page
    user = start(model, {"host_memory_gib": 0.5}, kv_cache_memory_bytes=1 << 28)
    assert user.cache_config.kv_cache_memory_bytes == 1 << 28


def test_the_free_memory_found_does_not_change_the_compile_hash(model, monkeypatch):
    from vllm_lrqk.integration import settings

    monkeypatch.setattr(settings, "free_host_memory", lambda: 8 << 30)
    first = start(model, kv_cache_memory_bytes=1 << 28)
    monkeypatch.setattr(settings, "free_host_memory", lambda: 6 << 30)
    second = start(model, kv_cache_memory_bytes=1 << 28)
    assert first.additional_config.engine.host != second.additional_config.engine.host
    assert first.compute_hash() == second.compute_hash()
    assert start(model, {"rank": 8}, kv_cache_memory_bytes=1 << 28).compute_hash() != first.compute_hash()


def test_settings_travel_to_other_processes(model):
    import pickle

    config = start(model, {"rank": 8, "host_memory_gib": 0.25})
    copy = pickle.loads(pickle.dumps(config))
    assert copy.additional_config["lrqk"] == {"rank": 8, "host_memory_gib": 0.25}
    assert copy.additional_config.engine.host.memory_bytes == 1 << 28
    assert copy.additional_config.engine.method.settings.rank == 8
    assert copy.attention_config.backend.name == "LRQK"


def test_other_backends_are_left_alone(model):
    plain = EngineArgs(model=str(model), skip_tokenizer_init=True, max_model_len=2048).create_engine_config()
    assert not plain.cache_config.user_specified_block_size
    assert plain.parallel_config.worker_extension_cls == ""
    assert plain.cache_config.kv_cache_memory_bytes is None
    assert plain.additional_config == {}


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ((0, 32), None),
        ((0, 33), "this is 0.33, whose Python part was tried on the CPU platform."),
        ((1, 0), "this is 1.0."),
        (None, None),
    ],
)
def test_a_version_that_is_not_tested_is_named(model, monkeypatch, version, text):
    from vllm_lrqk.integration import startup

    said = []
    monkeypatch.setattr(startup.compat, "vllm_version", lambda: version)
    monkeypatch.setattr(startup.logger, "warning_once", lambda text, *values: said.append(text % values))
    start(model)
    assert said == ([f"vllm-lrqk is tested with vLLM 0.32, {text}"] if text else [])


def test_settings_without_the_backend_are_pointed_out(model, monkeypatch):
    from vllm_lrqk.integration import startup

    said = []
    monkeypatch.setattr(startup.logger, "warning_once", lambda text, *values: said.append(text % values))
    start(model, {"rank": 8}, attention_backend="CPU_ATTN")
    assert len(said) == 1
    assert "lrqk" in said[0]


def test_a_backend_per_kind_passes_the_same_checks(model):
    """vLLM parses such a setting before plugins are loaded, unless somebody has loaded them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    per_kind = {"attention_backend": None, "attention_config": {"backend_per_kind": {"full_attention": "LRQK"}}}
    assert start(model, **per_kind).cache_config.block_size == 256
    with pytest.raises(ValueError, match="top_k"):
        start(model, {"top_k": 0}, **per_kind)
