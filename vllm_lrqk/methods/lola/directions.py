"""Directions of keys and queries along which the slope state follows the values.

A file of directions is a safetensors file with, per layer i (0 is the model's first attention layer),

    layers.i.query_directions    float32 [KV, r, d]
    layers.i.key_directions      float32 [KV, r, d]

where q . k ~ (query_directions q) . (key_directions k) as well as r directions can. Without a file both are the
same r pseudo-random orthonormal vectors, for every layer and head.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace, LayerShape

SEED = 20505


@dataclass(frozen=True)
class Directions:
    """Of one layer: float32 [KV, r, d] each."""

    query: torch.Tensor
    key: torch.Tensor

    def to(self, device: torch.device) -> "Directions":
        return Directions(self.query.to(device), self.key.to(device))


def random_directions(num_kv_heads: int, head_size: int, rank: int) -> Directions:
    """Fixed orthonormal directions: a function of head size and rank alone."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(head_size, rank, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(normal)
    basis = (basis * triangle.diagonal().sign()).float()  # QR leaves the signs open
    expanded = basis.mT.expand(num_kv_heads, -1, -1).contiguous()
    return Directions(expanded, expanded)


def load_directions(path: str, shape: LayerShape, place: LayerPlace, rank: int) -> Directions:
    """Directions of one layer from a file, which has the heads of all tensor-parallel ranks.

    Raises:
        ConfigError: the file is missing, has no such layer, or belongs to another model.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"lola.directions is {path!r}, but there is no such file: name one, or set it to null.")
    loaded = []
    expected = (shape.kv_heads * place.ranks, rank, shape.head_size)
    heads = slice(place.rank * shape.kv_heads, (place.rank + 1) * shape.kv_heads)
    try:
        with safe_open(path, framework="pt") as tensors:
            for side in ("query", "key"):
                name = f"layers.{place.number}.{side}_directions"
                if name not in tensors.keys():  # noqa: SIM118
                    raise ConfigError(f"lola.directions is {path!r}, but the file has no tensor {name}.")
                tensor = tensors.get_tensor(name)
                if tuple(tensor.shape) != expected:
                    raise ConfigError(
                        f"lola.directions is {path!r}, but its {name} has shape {tuple(tensor.shape)} "
                        f"where the model and state_rank need {expected}: take the directions of this model."
                    )
                loaded.append(tensor[heads].float().contiguous())
    except SafetensorError as error:
        raise ConfigError(f"lola.directions is {path!r}, but is no safetensors file ({error}).") from None
    return Directions(*loaded)
