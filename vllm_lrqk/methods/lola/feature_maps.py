"""Feature maps of `state: "hedgehog"`, from a file of this package or from a checkpoint of LoLCATs.

This package's files are safetensors with, per layer i (0 is the model's first attention layer),

    layers.i.query_map    [H, d, f]             features of a query are the softmax of +-(q W), 2 f of them
    layers.i.key_map      [KV or H, d, f]       one per KV head, or one per query head
    layers.i.bias         [H]                   b of the balance
    layers.i.kappa        [H, d], optional      kappa of the balance

Balance of the linear part, exp(c(q)), against the softmax part: with kappa, c(q) = kappa.q + b; without it,
c(q) = largest score in window and cache + b, which is the formula that LoLCATs trains with.

Checkpoints of LoLCATs (the `model_state_dict` of github.com/HazyResearch/lolcats, a .pt or safetensors file) name the
same tensors, after any prefix,

    layers.i.self_attn.feature_map_q.mlp.layer    [H, d, f]
    layers.i.self_attn.feature_map_k.mlp.layer    [H, d, f]; missing where queries and keys share their maps
    layers.i.self_attn.window_factors             [1, H, 1, 1], whose sigmoid g weighs the softmax part: b = -log g

Bias terms, skip connections and `affine_attention_factors` of that repository are not supported; its published
configurations use none of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import softplus

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace, LayerShape

_LOLCATS = re.compile(
    r"layers\.(\d+)\.self_attn\.(feature_map_q\.mlp\.layer|feature_map_k\.mlp\.layer|window_factors)$"
)
_OWN = re.compile(r"^layers\.(\d+)\.(query_map|key_map|bias|kappa)$")
_OWN_NAMES = {
    "feature_map_q.mlp.layer": "query_map",
    "feature_map_k.mlp.layer": "key_map",
    "window_factors": "window_factors",
}


@dataclass(frozen=True)
class FeatureMaps:
    """Of one layer, float32."""

    query: torch.Tensor
    """[H, d, f]"""
    key: torch.Tensor
    """[KV, d, f], or [H, d, f]: then every query head has a state, a window and a cache of its own, as published."""
    bias: torch.Tensor
    """[H]"""
    kappa: torch.Tensor | None
    """[H, d]; None: the balance follows the largest score."""

    @property
    def num_features(self) -> int:
        return 2 * self.query.shape[-1]

    def to(self, device: torch.device) -> "FeatureMaps":
        kappa = None if self.kappa is None else self.kappa.to(device)
        return FeatureMaps(self.query.to(device), self.key.to(device), self.bias.to(device), kappa)


def load_feature_maps(path: str, shape: LayerShape, place: LayerPlace) -> FeatureMaps:
    """Feature maps of one layer from a file, which has the heads of all tensor-parallel ranks.

    Raises:
        ConfigError: the file is missing or no such file, has no such layer, or belongs to another model.
    """
    tensors = _read_layer(path, place.number)

    def part(name: str, tensor: torch.Tensor, heads: int, *rest: int) -> torch.Tensor:
        """This rank's heads of a tensor of [heads of all ranks, ...]."""
        expected = (heads * place.ranks, *rest)
        if tuple(tensor.shape) != expected:
            raise ConfigError(
                f"lola.feature_maps is {path!r}, but its {name} of layer {place.number} has shape "
                f"{tuple(tensor.shape)} where the model needs {expected}: take the maps of this model."
            )
        return tensor[place.rank * heads : (place.rank + 1) * heads].float().contiguous()

    query = tensors["query_map"]
    key = tensors.get("key_map", query)
    key_heads = shape.heads if key.shape[:1] == query.shape[:1] else shape.kv_heads
    size = (shape.head_size, query.shape[-1])
    query, key = part("query map", query, shape.heads, *size), part("key map", key, key_heads, *size)
    if "window_factors" in tensors:
        bias = part("window factors", softplus(-tensors["window_factors"].float().flatten()), shape.heads)
    elif "bias" in tensors:
        bias = part("bias", tensors["bias"], shape.heads)
    else:
        bias = torch.zeros(shape.heads)
    kappa = part("kappa", tensors["kappa"], shape.heads, shape.head_size) if "kappa" in tensors else None
    return FeatureMaps(query, key, bias, kappa)


def map_shapes(path: str) -> tuple[torch.Size, torch.Size]:
    """Shapes of the query map and the key map of layer 0, all ranks together.

    Raises:
        ConfigError: the file is missing, or is no file of feature maps.
    """
    tensors = _read_layer(path, 0)
    return tensors["query_map"].shape, tensors.get("key_map", tensors["query_map"]).shape


def _read_layer(path: str, layer: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer by the names of this package (and "window_factors")."""
    if not Path(path).is_file():
        raise ConfigError(f"lola.feature_maps is {path!r}, but there is no such file: name one.")
    names, read = _open(path)
    found = {}
    for name in names:
        if (match := _OWN.search(name)) and int(match[1]) == layer:
            found[match[2]] = read(name)
        elif (match := _LOLCATS.search(name)) and int(match[1]) == layer:
            found[_OWN_NAMES[match[2]]] = read(name)
    if "query_map" not in found:
        raise ConfigError(f"lola.feature_maps is {path!r}, but the file has no feature maps of layer {layer}.")
    return found


def _open(path: str) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            tensors = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConfigError(f"lola.feature_maps is {path!r}, but is no safetensors file ({error}).") from None
        return list(tensors.keys()), tensors.get_tensor
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its parser meets
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigError(f"lola.feature_maps is {path!r}, but is no checkpoint of torch ({reason}).") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model_state_dict"), dict):
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, dict):
        raise ConfigError(f"lola.feature_maps is {path!r}, but holds no dictionary of tensors.")
    return [str(name) for name in loaded], lambda name: loaded[name]
