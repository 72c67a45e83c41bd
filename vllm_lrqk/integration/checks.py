"""What the methods cannot serve, each as one sentence with the setting, its value and the remedy."""

from pathlib import Path
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import Method, ModelFacts
from vllm_lrqk.core.window_checks import check_windows, window_of


def check_model(vllm_config: Any, chosen: Method) -> None:
    """Refuse models and engine settings that are known before anything is loaded.

    Raises:
        ConfigError: the first thing found that cannot be served.
    """
    model = vllm_config.model_config
    method, name, text = chosen.name, model.model, model.hf_text_config
    other = "serve it with another attention backend."
    if model.use_mla:
        raise ConfigError(f"{method} does not support multi-head latent attention, which {name} uses: {other}")
    if model.is_encoder_decoder:
        raise ConfigError(f"{method} does not support encoder-decoder models such as {name}: {other}")
    if model.is_attention_free or model.is_hybrid:
        raise ConfigError(f"{method} needs attention in every layer, and {name} has other layers: {other}")
    if model.runner_type != "generate":
        raise ConfigError(f"{method} serves generation, but the runner of {name} is {model.runner_type!r}: {other}")
    if _has_alibi(model.hf_config) or _has_alibi(text):
        raise ConfigError(f"{method} does not support ALiBi, which {name} uses: {other}")
    window = None if model.disable_sliding_window else window_of(text)
    if window is not None:
        kinds = getattr(text, "layer_types", None) or ()
        check_windows(chosen, name, window, kinds, vllm_config.parallel_config.pipeline_parallel_size, other)
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ConfigError(
                f"--disable-hybrid-kv-cache-manager is set, but {method} needs that manager beside the sliding-window "
                f"layers of {name}: leave it out."
            )
    if getattr(text, "attention_chunk_size", None):
        raise ConfigError(f"{method} does not support chunked local attention, which {name} uses: {other}")
    soft_cap = getattr(text, "attn_logit_softcapping", None)
    if soft_cap and not _serves_caps_and_sinks(chosen):
        raise ConfigError(f"{method} does not support a soft cap on attention logits ({name}: {soft_cap}): {other}")
    _check_kv_dtype(vllm_config, method)
    if chosen.settings.capture is not None:
        _check_capture(vllm_config, f"{chosen.settings.key}.capture", chosen.settings.capture)
    _check_engine(vllm_config, method)
    if vllm_config.speculative_config is not None:
        _check_drafts(vllm_config, chosen)
    chosen.check(model_facts(vllm_config))
    chosen.check_machine()


def model_facts(vllm_config: Any) -> ModelFacts:
    """What a method may ask of the model."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    heads = model.get_num_attention_heads(vllm_config.parallel_config) * ranks, model.get_total_num_kv_heads()
    config = model.hf_text_config.to_dict()
    return ModelFacts(model.model, model.get_head_size(), *heads, model.max_model_len, config)


def _check_capture(vllm_config: Any, field: str, folder: str) -> None:
    if vllm_config.cache_config.enable_prefix_caching:
        raise ConfigError(
            f"{field} is {folder!r}, but tokens from the prefix cache cannot be captured: "
            "add --no-enable-prefix-caching."
        )
    if vllm_config.device_config.device_type != "cpu":
        raise ConfigError(f"{field} is {folder!r}, but only the CPU platform captures: leave it out.")
    if next(Path(folder).glob("request-*"), None) is not None:
        raise ConfigError(f"{field} is {folder!r}, which has captured requests already: name an empty folder.")


def _check_kv_dtype(vllm_config: Any, method: str) -> None:
    """Refuse quantised keys and values, whether the flag or the checkpoint asks for them."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    own = str(model.dtype).removeprefix("torch.")
    quantization = model.model_arch_config.quantization_config or {}
    scheme = quantization.get("kv_cache_scheme") or quantization.get("kv_cache_quant_algo")
    if dtype == own or (dtype == "auto" and not scheme):
        return
    asked = f"--kv-cache-dtype is {dtype}"
    if scheme:  # which "auto" follows
        asked += f" and {model.model} brings scales for quantised keys and values"
    raise ConfigError(
        f"{asked}, but {method} keeps keys and values in the model's own type ({own}): "
        f"use --kv-cache-dtype {own if scheme else 'auto'}."
    )


def _check_engine(vllm_config: Any, method: str) -> None:
    parallel = vllm_config.parallel_config
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if vllm_config.model_config.enable_sleep_mode and not is_cpu:
        raise ConfigError(
            f"{method} does not support sleep mode (--enable-sleep-mode): leave it out, or stop the server instead."
        )
    if vllm_config.kv_transfer_config is not None:
        connector = vllm_config.kv_transfer_config.kv_connector
        raise ConfigError(
            f"{method} does not support KV connectors (--kv-transfer-config has {connector}): leave it out."
        )
    for flag, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ConfigError(f"{method} does not support context parallelism ({flag} is {size}): set it to 1.")
    if parallel.use_ubatching:
        raise ConfigError(f"{method} does not support micro-batches (--enable-dbo or --ubatch-size): leave them out.")


def _check_drafts(vllm_config: Any, chosen: Method) -> None:
    speculative, key = vllm_config.speculative_config, chosen.settings.key
    drafts = f"--speculative-config has method {speculative.method}"
    if not chosen.serves_drafts:
        raise ConfigError(f"{drafts}, but {chosen.name} cannot take back what rejected tokens did: leave it out.")
    if speculative.method != "ngram":
        raise ConfigError(f"{drafts}, but {chosen.name} serves drafts of method ngram only: set it to ngram.")
    if vllm_config.device_config.device_type != "cpu":
        raise ConfigError(
            f"{drafts}, but {chosen.name} serves drafted tokens on the CPU platform only, as its CUDA graphs and steps "
            "have one token per request: leave it out."
        )
    if chosen.settings.capture is not None:
        raise ConfigError(
            f"{key}.capture is {chosen.settings.capture!r}, but tokens that are drafted and rejected cannot be "
            "captured: leave --speculative-config out."
        )


def _has_alibi(hf_config: Any) -> bool:
    nested = getattr(hf_config, "attn_config", None) or {}
    if not isinstance(nested, dict):
        nested = vars(nested)
    return bool(
        getattr(hf_config, "alibi", False)
        or nested.get("alibi", False)
        or getattr(hf_config, "position_embedding_type", None) == "alibi"
        or getattr(hf_config, "model_type", None) == "bloom"
    )


def check_layer(
    method: str,
    alibi_slopes: Any,
    sliding_window: Any,
    attn_type: str,
    kv_sharing_target: Any,
    extra: dict,
) -> None:
    """Refuse what only the model's own code says about a layer.

    Raises:
        ConfigError: the first thing found that cannot be served.
    """
    found = {
        "ALiBi slopes": alibi_slopes is not None,
        f"a sliding window of {sliding_window} tokens": sliding_window is not None,
        f"attention of type {attn_type!r}": attn_type != "decoder",
        f"keys shared with {kv_sharing_target}": kv_sharing_target is not None,
        **{f"the attention feature {key!r}": value is not None for key, value in extra.items()},
    }
    _refuse_what_is(found, method)


def check_logits(method: Method, soft_cap: float | None, sinks: Any) -> None:
    """Refuse what a layer does to its logits where the method does not serve it.

    Raises:
        ConfigError: the first thing found that cannot be served.
    """
    if not _serves_caps_and_sinks(method):
        found = {f"a soft cap of {soft_cap} on attention logits": bool(soft_cap), "learned sinks": sinks is not None}
        _refuse_what_is(found, method.name)
    settings = method.settings
    if settings.capture is not None and (soft_cap or sinks is not None):
        raise ConfigError(
            f"{settings.key}.capture is {settings.capture!r}, but soft caps and learned sinks of a layer are not "
            "captured: leave it out."
        )


def _serves_caps_and_sinks(method: Method) -> bool:
    return method.serves_caps_and_sinks and method.device_type == "cpu"


def _refuse_what_is(found: dict[str, bool], method: str) -> None:
    for what, present in found.items():
        if present:
            raise ConfigError(
                f"{method} does not support {what}, which this model uses: choose another attention backend."
            )


def check_selector(backend: Any, selector_config: Any) -> None:
    """Refuse what vLLM's selection finds unsupported by the backend.

    Raises:
        ConfigError: names every reason.
    """
    settings = selector_config._asdict()
    reasons = backend.validate_configuration(device_capability=None, **settings)
    if reasons:
        raise ConfigError(
            f"{backend.get_name()} cannot serve this model ({', '.join(reasons)}): choose another attention backend."
        )
