"""The byte format of one request's memory: every offset of it, in this one place.

A request's memory of one layer is one block of vLLM's pool; each KV head has one contiguous run of bytes in it. With
d head size, r state_rank, D features, R = window + chunk ring rows and L cache rows:

    offset 0                                                     block_bytes
    | sums of the state | ring          | cache         | positions | padding |
    | float32           | [R, 2, d]     | [L, 2, d]     | [L]       |         |
    |                   | model's dtype | model's dtype | int32     |         |

A row is a key with its value behind it. The sums, one section each:

    slope       key_mean [d], value_mean [d], cross_moment [r, d], second_moment [r, r]
    hedgehog    feature_values [D, d], feature_sum [D]
    none        nothing

`positions` are those of the cached tokens, ascending. How many rows of each part are in use follows from the number
of tokens alone (`LolaSettings.updates`, `cached`, `folded`), so the memory needs no clearing when another request
takes it over: nothing is read that the request has not written. Every section starts at a multiple of 64 bytes.
"""

from dataclasses import dataclass
from math import prod

import torch

from vllm_lrqk.methods.lola.settings import LolaSettings

ALIGNMENT = 64


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class MemoryFormat:
    """Sizes of one KV head's part of a request's memory."""

    settings: LolaSettings
    head_size: int
    dtype: torch.dtype
    """Of keys and values."""
    num_features: int = 0
    """Of `state: "hedgehog"`: the length of a feature vector."""

    @property
    def sums(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the state's sums."""
        d, rank = self.head_size, self.settings.state_rank
        if self.settings.state == "slope":
            return {"key_mean": (d,), "value_mean": (d,), "cross_moment": (rank, d), "second_moment": (rank, rank)}
        if self.settings.state == "hedgehog":
            return {"feature_values": (self.num_features, d), "feature_sum": (self.num_features,)}
        return {}

    @property
    def sum_offsets(self) -> dict[str, int]:
        """Byte offset of each of the sums."""
        offsets, end = {}, 0
        for name, shape in self.sums.items():
            offsets[name] = end
            end += _align(prod(shape) * 4)
        return offsets

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def ring_offset(self) -> int:
        return sum(_align(prod(shape) * 4) for shape in self.sums.values())

    @property
    def cache_offset(self) -> int:
        return self.ring_offset + _align(self.settings.ring_rows * self.row_bytes)

    @property
    def positions_offset(self) -> int:
        return self.cache_offset + _align(self.settings.cache * self.row_bytes)

    @property
    def layout(self) -> dict[str, int]:
        """The same numbers by the names of csrc/cpu/lola/layout.h."""
        settings = self.settings
        offsets = {f"{name}_offset": offset for name, offset in self.sum_offsets.items()}
        names = ("key_mean", "value_mean", "cross_moment", "second_moment", "feature_values", "feature_sum")
        none = dict.fromkeys((f"{name}_offset" for name in names), 0)
        return (none | offsets) | {
            "block_bytes": self.block_bytes,
            "ring_offset": self.ring_offset,
            "cache_offset": self.cache_offset,
            "positions_offset": self.positions_offset,
            "window": settings.window,
            "chunk": settings.chunk,
            "cache": settings.cache,
            "sink_tokens": settings.sink_tokens,
            "rank": settings.state_rank if settings.state == "slope" else 0,
            "num_features": self.num_features if settings.state == "hedgehog" else 0,
            "is_random": settings.select == "random",
        }

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV head, padding included."""
        return self.positions_offset + _align(self.settings.cache * 4)


class Memory:
    """Typed views into the memory of one layer; index 0 of each is the block, index 1 the head.

    Args:
        raw: uint8 [num_blocks, heads, block_bytes]; the last dimension contiguous.
        memory_format: the format of each head's part.
    """

    def __init__(self, raw: torch.Tensor, memory_format: MemoryFormat) -> None:
        f = memory_format
        if raw.dtype != torch.uint8 or raw.dim() != 3 or raw.shape[-1] != f.block_bytes or raw.stride(-1) != 1:
            raise ValueError(
                f"LoLA's memory must be uint8 [blocks, heads, {f.block_bytes}], got {raw.dtype} {tuple(raw.shape)}"
            )
        self.raw = raw
        self.format = f

        def view(start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return raw[..., start : start + prod(shape) * dtype.itemsize].view(dtype).unflatten(-1, shape)

        self.sums = {name: view(f.sum_offsets[name], shape, torch.float32) for name, shape in f.sums.items()}
        """float32 [num_blocks, heads, ...]"""
        self.ring = view(f.ring_offset, (f.settings.ring_rows, 2, f.head_size), f.dtype)
        """[num_blocks, heads, window + chunk, 2, d]"""
        self.cache = view(f.cache_offset, (f.settings.cache, 2, f.head_size), f.dtype)
        """[num_blocks, heads, cache, 2, d]"""
        self.positions = view(f.positions_offset, (f.settings.cache,), torch.int32)
        """int32 [num_blocks, heads, cache]"""

    @property
    def heads(self) -> int:
        return self.raw.shape[1]
