"""Sixty and more configurations that cannot be served, by kind: each ends start-up with one sentence.

The sentence names the field, its value and what to do instead; words of all three are listed with each case.
"""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from engines import tiny_llama
from startup import sentence, start

Case = tuple[dict[str, Any], list[str]]


def lrqk(values: Any, *words: str) -> Case:
    return {"additional_config": {"lrqk": values}}, [*words]


def other(method: str, values: dict[str, Any], *words: str) -> Case:
    return {"attention_backend": method, "additional_config": {method.lower(): values}}, [*words]


METHODS = [lrqk({})[0], other("LOLA", {})[0], other("AQUA", {})[0]]
DRAFT = "the model itself"
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
TYPES = [
    lrqk({"top_k": "many"}, "lrqk.top_k", "'many'", "whole number"),
    lrqk({"top_k": True}, "lrqk.top_k", "True", "whole number"),
    lrqk({"top_k": 1.5}, "lrqk.top_k", "1.5", "whole number"),
    lrqk({"rank": None}, "lrqk.rank", "None", "whole number"),
    lrqk({"page_size": "256"}, "lrqk.page_size", "'256'", "whole number"),
    lrqk({"top_p": "0.9"}, "lrqk.top_p", "'0.9'", "a number"),
    lrqk({"top_p": nan}, "lrqk.top_p", "nan", "finite"),
    lrqk({"hot_cache": 1}, "lrqk.hot_cache", "1", "true, false"),
    lrqk({"hot_rows": [64]}, "lrqk.hot_rows", "[64]", "whole number"),
    lrqk({"host_memory_gib": "64G"}, "lrqk.host_memory_gib", "'64G'", "a number"),
    lrqk({"host_memory_gib": inf}, "lrqk.host_memory_gib", "inf", "finite"),
    lrqk({"capture": 5}, "lrqk.capture", "5", "a string"),
    lrqk({"capture": ""}, "lrqk.capture", "''", "not empty"),
    lrqk({"residual": False}, "lrqk.residual", "False", "a string"),
]
RANGES = [
    lrqk({"top_k": 0}, "lrqk.top_k", "0", "1 or more"),
    lrqk({"rank": 0}, "lrqk.rank", "0", "4 or more"),
    lrqk({"rank": 6}, "lrqk.rank", "6", "multiple of 4"),
    lrqk({"rank": 128}, "lrqk.rank", "128", "at most", "64"),
    lrqk({"page_size": 100}, "lrqk.page_size", "100", "one of", "256"),
    lrqk({"top_p": 0.0}, "lrqk.top_p", "0", "above 0"),
    lrqk({"top_p": 1.5}, "lrqk.top_p", "1.5", "1 or less"),
    lrqk({"recent_tokens": 0}, "lrqk.recent_tokens", "0", "1 or more"),
    lrqk({"sink_tokens": -1}, "lrqk.sink_tokens", "-1", "0 or more"),
    lrqk({"residual": "median"}, "lrqk.residual", "'median'", "one of", "linear"),
    lrqk({"value_rank": 3}, "lrqk.value_rank", "3", "4 or more"),
    lrqk({"factorization": "svd"}, "lrqk.factorization", "'svd'", "one of", "key_pca"),
    lrqk({"factor_dtype": "int4"}, "lrqk.factor_dtype", "'int4'", "one of", "int8"),
    lrqk({"iterations": 0}, "lrqk.iterations", "0", "1 or more"),
    lrqk({"lambda_q": 0.0}, "lrqk.lambda_q", "0", "above 0"),
    lrqk({"hot_cache": "yes"}, "lrqk.hot_cache", "'yes'", "one of", "auto"),
    lrqk({"host_memory_gib": -1.0}, "lrqk.host_memory_gib", "-1", "above 0"),
    lrqk({"capture_tokens": 0}, "lrqk.capture_tokens", "0", "1 or more"),
    other("LOLA", {"window": 10}, "lola.window", "10", "16 or more"),
    other("LOLA", {"chunk": 24}, "lola.chunk", "24", "multiple of 16"),
    other("LOLA", {"state_rank": 128}, "lola.state_rank", "128", "at most", "64"),
    other("LOLA", {"state": "fog"}, "lola.state", "'fog'", "one of", "slope"),
    other("AQUA", {"keep": 0.0}, "aqua.keep", "0", "above 0"),
    other("AQUA", {"block_size": 100}, "aqua.block_size", "100", "one of", "128"),
]
KEYS = [
    lrqk({"rnak": 8}, "lrqk.rnak", "did you mean rank?"),
    lrqk({"temperature": 8}, "lrqk.temperature", "known keys", "top_k"),
    lrqk(8, "lrqk", "8", "dictionary"),
    ({"additional_config": {"LRQK": {"top_k": 8}}}, ["additional_config", "'LRQK'", "'lrqk'", "rename"]),
    ({"additional_config": {"top_k": 8}}, ["additional_config", "'top_k'", '{"lrqk": {"top_k": 8}}']),
    ({"additional_config": {"lola": {"window": 64}}}, ["additional_config", "'lola'", "LRQK", "remove"]),
    (
        {"attention_config": {"backend_per_kind": {"sliding_window": "LRQK"}}, "attention_backend": None},
        ["backend_per_kind", "sliding_window", "LRQK", "remove"],
    ),
]
COMBINATIONS = [
    lrqk({"top_k": 64, "hot_rows": 64}, "lrqk.hot_rows", "64", "388 or more"),
    lrqk({"factorization": "calibrated"}, "lrqk.calibration", "calibrate"),
    lrqk({"factorization": "calibrated", "rank": 12}, "lrqk.rank", "12", "multiple of 8"),
    lrqk({"factorization": "calibrated", "factor_dtype": "bfloat16"}, "lrqk.factor_dtype", "'bfloat16'", "leave it"),
    lrqk({"factorization": "calibrated", "calibration": "/no/such"}, "lrqk.calibration", "/no/such"),
    lrqk({"capture": "/tmp/none"}, "lrqk.capture", "'/tmp/none'", "--no-enable-prefix-caching"),
    lrqk({"host_memory_gib": 0.001}, "lrqk.host_memory_gib", "0.001", "max_model_len=2048", "--max-model-len"),
    lrqk({"host_memory_gib": 1e6}, "lrqk.host_memory_gib", "1e+06", "lower it to"),
    other("LOLA", {"cache": 2}, "lola.cache", "2", "4 or more"),
    other("LOLA", {"state": "hedgehog"}, "lola.feature_maps", "name the file"),
    other("LOLA", {"state": "none", "directions": "x"}, "lola.directions", "'x'", "slope"),
    other("LOLA", {"feature_maps": "x"}, "lola.feature_maps", "'x'", "hedgehog"),
    other("LOLA", {"directions": "/no/such"}, "lola.directions", "/no/such"),
    other("AQUA", {}, "aqua.calibration", "calibrate"),
    other("AQUA", {"calibration": "/no/such"}, "aqua.calibration", "/no/such"),
]
FLAGS = [
    ({"block_size": 128}, ["--block-size", "128", "lrqk.page_size"]),
    ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype", "fp8", "auto"]),
    ({"decode_context_parallel_size": 2, "tensor_parallel_size": 4}, ["--decode-context-parallel-size", "2", "to 1"]),
    *(
        (
            {**method, "kv_transfer_config": {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}},
            ["--kv-transfer-config", "OffloadingConnector", "leave it out"],
        )
        for method in METHODS
    ),
    *(
        (
            {**method, "speculative_config": {"method": "draft_model", "model": DRAFT, "num_speculative_tokens": 2}},
            ["--speculative-config", "draft_model", *words],
        )
        for method, words in zip(METHODS, (["set it to ngram"], ["LOLA", "leave it out"], ["set it to ngram"]))
    ),
    (
        {"speculative_config": NGRAM, **lrqk({"capture": "/tmp/no-such-folder"})[0], "enable_prefix_caching": False},
        ["lrqk.capture", "/tmp/no-such-folder", "leave --speculative-config out"],
    ),
    (
        {"speculative_config": NGRAM, **other("LOLA", {})[0]},
        ["--speculative-config", "ngram", "LOLA", "leave it out"],
    ),
    (
        {"speculative_config": {"method": "custom_class", "model": "a.Drafter", "num_speculative_tokens": 2}},
        ["--speculative-config", "custom_class", "set it to ngram"],
    ),
    ({"runner": "pooling"}, ["runner", "pooling", "another attention backend"]),
]
LLAMA_FIELDS = [
    (
        {"hf_overrides": {"attn_logit_softcapping": 50.0}, **other("LOLA", {})[0]},
        ["soft cap", "50", "another attention backend"],
    ),
    ({"hf_overrides": {"alibi": True}}, ["ALiBi", "another attention backend"]),
    ({"hf_overrides": {"attention_chunk_size": 512}}, ["chunked local attention", "another attention backend"]),
]
CASES = TYPES + RANGES + KEYS + COMBINATIONS + FLAGS + LLAMA_FIELDS


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_llama(models, 4, 2, 64)


def assert_one_sentence(error: Any, words: list[str]) -> None:
    message = sentence(error)
    assert all(word in message for word in words), message
    assert message.endswith((".", "?")), message
    assert "\n" not in message, message


@pytest.mark.parametrize(("settings", "words"), CASES, ids=[repr(settings)[:70] for settings, _ in CASES])
def test_one_sentence(model: Any, settings: dict[str, Any], words: list[str]) -> None:
    if settings.get("speculative_config", {}).get("model") == DRAFT:
        settings = settings | {"speculative_config": settings["speculative_config"] | {"model": str(model)}}
    with pytest.raises((ValueError, AssertionError)) as error:
        start(model, **settings)
    assert_one_sentence(error, words)


SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
BAD_MODELS: dict[str, dict[str, Any]] = {
    "sliding-window layers": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 512,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "multi-head latent attention": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 4096,
    },
    "encoder-decoder": {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_target_positions": 4096,
        "max_source_positions": 1500,
    },
    "other layers": {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "state_size": 16,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_models(tmp_path: Path, what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | BAD_MODELS[what]))
    with pytest.raises((ValueError, AssertionError)) as error:
        start(tmp_path, max_model_len=1024)
    assert_one_sentence(error, [what, "another attention backend"])


def test_there_are_sixty() -> None:
    assert len(CASES) + len(BAD_MODELS) >= 60
