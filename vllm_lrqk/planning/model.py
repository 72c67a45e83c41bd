"""What memory depends on, read from a model's config.json: no weights, no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.model_heads import kv_heads_of_blocks
from vllm_lrqk.core.window_checks import FULL, SLIDING, window_of

_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelShape:
    """A model as attention sees it."""

    name: str
    kv_heads: tuple[int, ...]
    """Of each layer; 0 where it has no attention."""
    heads: int
    """Query heads of a layer."""
    head_size: int
    dtype: torch.dtype
    """Of keys and values."""
    context: int
    """Tokens that the model was made for."""
    config: Mapping[str, Any]
    """Of the text model, as transformers writes it."""
    window: int | None = None
    """Tokens of the sliding window of layers that have one; None: all attend to all tokens."""
    layer_types: tuple[str, ...] = ()
    """As transformers writes them; empty where layers are alike."""

    @property
    def full_kv_heads(self) -> tuple[int, ...]:
        """Of each layer that attends to all tokens; 0 elsewhere."""
        if self.window is None:
            return self.kv_heads
        return tuple(count if kind == FULL else 0 for count, kind in zip(self.kv_heads, self.layer_types))

    def facts(self, max_model_len: int) -> ModelFacts:
        """What a method may ask of it."""
        return ModelFacts(self.name, self.head_size, self.heads, max(self.kv_heads), max_model_len, self.config)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // next(count for count in self.kv_heads if count)


def read_model(name: str, dtype: str = "auto") -> ModelShape:
    """The shape of a model.

    Args:
        name: folder, or name on the Hugging Face hub.
        dtype: as of vLLM; "auto" is what the checkpoint says, and bfloat16 where it says float32.

    Raises:
        ConfigError: there is no configuration, or it says nothing that can be served.
    """
    config = _text_config(name)
    heads = _first(config, ("num_attention_heads", "n_head", "n_heads"))
    hidden, layers = _first(config, ("hidden_size", "n_embd", "d_model")), _layers(config)
    if not heads or not layers:
        raise ConfigError(f"{name} has no attention heads or layers in its config.json: name a text model.")
    if getattr(config, "kv_lora_rank", None):
        raise ConfigError(f"{name} uses multi-head latent attention, which no method serves: name another model.")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{name} is an encoder-decoder model, which no method serves: name another model.")
    if getattr(config, "attention_chunk_size", None):
        raise ConfigError(f"{name} uses chunked local attention, which no method serves: name another model.")
    layer_types = tuple(getattr(config, "layer_types", None) or ())
    window, odd = window_of(config), sorted(set(layer_types) - {FULL, SLIDING})
    if window is not None and FULL not in layer_types:
        raise ConfigError(
            f"{name} has a sliding window of {window} tokens in every layer, which no method serves but with "
            "--disable-sliding-window, which caps the context at the window: name another model."
        )
    if odd:
        raise ConfigError(f"{name} has layers of kind {odd[0]!r}, which no method serves: name another model.")
    head_size = getattr(config, "head_dim", None) or (hidden or 0) // heads
    if not head_size:
        raise ConfigError(f"{name} says nothing of its head size (head_dim, hidden_size): name another model.")
    context = _first(config, _CONTEXT) or 2048
    kv_heads = tuple(_kv_heads(config, heads, layers))
    shape = name, kv_heads, heads, head_size, _dtype(name, config, dtype), context, config.to_dict()
    return ModelShape(*shape, window, layer_types)


def _text_config(name: str) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    if Path(name).exists() and not Path(name, "config.json").exists():
        raise ConfigError(f"{name} has no config.json: name the folder of a model, or its name on the hub.")
    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError) as error:
        known = not isinstance(error, OSError)
        try:  # of a kind that this transformers does not know: its fields are read as they are
            values, _ = PretrainedConfig.get_config_dict(name)
        except (OSError, ValueError) as second:
            reason = " ".join(str(second).split())[:200].rstrip(".")
            raise ConfigError(f"{name} cannot be read ({reason}): name a folder with a config.json.") from second
        if not known or not values:
            raise ConfigError(f"{name} cannot be read: name a folder with a config.json.") from error
        values = values.get("text_config", values)
        return PretrainedConfig.from_dict(values)


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def _layers(config: Any) -> int | None:
    return _first(config, ("num_hidden_layers", "n_layer", "n_layers"))


def _kv_heads(config: Any, heads: int, layers: int) -> list[int]:
    if getattr(config, "is_heterogeneous", False):  # transformers' own way to say that layers differ
        per_layer = [config.per_layer_config[layer] for layer in range(layers)]
        return [_first(of_layer, _KV_HEADS) or heads for of_layer in per_layer]
    blocks = kv_heads_of_blocks(config, heads)
    if blocks is not None:
        return blocks
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return [1] * layers
    return [_first(config, _KV_HEADS) or heads] * layers


def _dtype(name: str, config: Any, asked: str) -> torch.dtype:
    if asked != "auto":
        if asked not in DTYPES:
            raise ConfigError(f"--dtype is {asked!r}, but must be one of auto, {', '.join(DTYPES)}.")
        return DTYPES[asked]
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    own = DTYPES.get(own, torch.float32) if isinstance(own, str) else own
    return torch.bfloat16 if own == torch.float32 else own
