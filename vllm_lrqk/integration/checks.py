"""What the methods cannot serve, each as one sentence with the setting, its value and the remedy."""

from pathlib import Path
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_pages import GIB
from vllm_lrqk.core.method import Method, ModelFacts
from vllm_lrqk.devices.pinned import MAX_PINNED_SHARE
from vllm_lrqk.integration.settings import HostPlan


def check_model(vllm_config: Any, chosen: Method) -> None:
    """Refuse models and engine settings that are known before anything is loaded.

    Raises:
        ConfigError: the first thing found that cannot be served.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
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
    window = _sliding_window(model, text)
    if window is not None:
        raise ConfigError(
            f"{method} does not support sliding-window layers, and {name} has a window of {window} tokens: add "
            "--disable-sliding-window if all layers have it (this caps the context at the window), or " + other
        )
    if getattr(text, "attention_chunk_size", None):
        raise ConfigError(f"{method} does not support chunked local attention, which {name} uses: {other}")
    soft_cap = getattr(text, "attn_logit_softcapping", None)
    if soft_cap:
        raise ConfigError(f"{method} does not support a soft cap on attention logits ({name}: {soft_cap}): {other}")
    if cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ConfigError(
            f"--kv-cache-dtype is {cache.cache_dtype}, but {method} keeps keys and values in the model's own type "
            f"({model.dtype}): use --kv-cache-dtype auto."
        )
    if chosen.settings.capture is not None:
        _check_capture(vllm_config, f"{chosen.settings.key}.capture", chosen.settings.capture)
    _check_engine(vllm_config, method)
    chosen.check(model_facts(vllm_config))


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


def _check_engine(vllm_config: Any, method: str) -> None:
    parallel = vllm_config.parallel_config
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
    if vllm_config.speculative_config is not None:
        drafter = vllm_config.speculative_config.method
        raise ConfigError(
            f"{method} does not support speculative decoding (--speculative-config has {drafter}): leave it out."
        )
    if parallel.use_ubatching:
        raise ConfigError(f"{method} does not support micro-batches (--enable-dbo or --ubatch-size): leave them out.")


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


def _sliding_window(model: Any, text: Any) -> int | None:
    if model.disable_sliding_window:
        return None
    window = model.get_sliding_window()
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    if getattr(text, "use_sliding_window", True) is False:
        return None
    return window


def check_layer(
    method: str,
    alibi_slopes: Any,
    sliding_window: Any,
    logits_soft_cap: Any,
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
        f"a soft cap of {logits_soft_cap} on attention logits": bool(logits_soft_cap),
        f"attention of type {attn_type!r}": attn_type != "decoder",
        f"keys shared with {kv_sharing_target}": kv_sharing_target is not None,
        **{f"the attention feature {key!r}": value is not None for key, value in extra.items()},
    }
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


def check_pinned_share(memory_bytes: int, free_bytes: int, field: str) -> None:
    """Refuse to pin more than `MAX_PINNED_SHARE` of a host's free memory.

    Args:
        memory_bytes: of the host tier, all ranks of this host together.
        field: the setting that asks for it.

    Raises:
        ConfigError: it is more.
    """
    most = free_bytes * MAX_PINNED_SHARE
    if memory_bytes > most:
        raise ConfigError(
            f"{field} is {memory_bytes / GIB:.3g}, but of the {free_bytes / GIB:.3g} GiB that are free "
            f"at most {MAX_PINNED_SHARE:.0%} may be pinned: lower it to {most / GIB:.3g}."
        )


def check_host_memory(method: Method, host: HostPlan, block_size: int, max_model_len: int) -> None:
    """Raise ConfigError unless one request of `max_model_len` tokens fits into the host tier."""
    needed = -(-max_model_len // block_size) + 1
    if host.num_pages >= needed:
        return
    field = f"{method.settings.key}.host_memory_gib"
    source = field if method.host_memory_gib is not None else "half of the free host memory"
    raise ConfigError(
        f"{source} gives {host.memory_bytes / GIB:.3g} GiB per rank, but keys and values of max_model_len="
        f"{max_model_len} tokens need {needed * host.page_bytes / GIB:.3g} GiB: raise {field} or lower --max-model-len."
    )
