"""The byte format of a block: every offset of it, in this one place.

A block of N tokens has one contiguous run of bytes per KV head in vLLM's own KV cache tensor. With d head size,
s stored dimensions and k, v bytes per element of keys and values:

    offset 0                                           block_bytes
    | key K^      | value V     | key_scale            |
    | [s, N]      | [N, d]      | [N], int8 keys only  |
    | k bytes     | v bytes     | float32              |

Keys are projected and dimension-major: one dimension of all tokens is one run of N k bytes, so that a step which
chooses dimensions reads those alone. Values are as the model gives them.

int8 keys are divided by sigma, the calibrated deviation of each dimension, and quantised with one scale per token:

    k^_nj = key_scale_n * key_nj * sigma_j

A token's bytes depend on that token alone, so that a block never has to be quantised anew.
"""

from dataclasses import dataclass

import torch

from vllm_lrqk.methods.aqua.settings import AquaSettings


@dataclass(frozen=True)
class BlockFormat:
    """Sizes of one block; `block_size` is a multiple of 16 and `stored` of 4, which aligns every section."""

    block_size: int
    head_size: int
    stored: int
    key_dtype: torch.dtype
    value_dtype: torch.dtype

    @classmethod
    def from_config(cls, config: AquaSettings, block_size: int, head_size: int, dtype: torch.dtype) -> "BlockFormat":
        """The format of a layer of a model in `dtype`."""
        key_dtype = torch.int8 if config.key_dtype == "int8" else dtype
        return cls(block_size, head_size, config.num_stored(head_size), key_dtype, dtype)

    @property
    def is_quantized(self) -> bool:
        return self.key_dtype == torch.int8

    @property
    def value_offset(self) -> int:
        return self.stored * self.block_size * self.key_dtype.itemsize

    @property
    def key_scale_offset(self) -> int:
        return self.value_offset + self.block_size * self.head_size * self.value_dtype.itemsize

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and KV head; vLLM allocates block_size times this."""
        scale = torch.float32.itemsize if self.is_quantized else 0
        return self.stored * self.key_dtype.itemsize + self.head_size * self.value_dtype.itemsize + scale

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size


class Blocks:
    """Typed views into the blocks of one layer.

    Args:
        raw: uint8 [num_blocks, kv_heads, block_bytes]; the last dimension contiguous.
        block_format: the format of each block.
    """

    def __init__(self, raw: torch.Tensor, block_format: BlockFormat) -> None:
        f = block_format
        if raw.dtype != torch.uint8 or raw.shape[-1] != f.block_bytes or raw.stride(-1) != 1:
            raise ValueError(
                f"blocks must be uint8 [blocks, heads, {f.block_bytes}], got {raw.dtype} {tuple(raw.shape)}"
            )
        self.raw = raw
        self.format = f

        def view(start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
            return raw[..., start : start + length * dtype.itemsize].view(dtype)

        self.key = view(0, f.stored * f.block_size, f.key_dtype).unflatten(-1, (f.stored, f.block_size))
        """[num_blocks, kv_heads, stored, block_size]"""
        self.value = view(f.value_offset, f.block_size * f.head_size, f.value_dtype).unflatten(
            -1, (f.block_size, f.head_size)
        )
        """[num_blocks, kv_heads, block_size, head_size]"""
        if f.is_quantized:
            self.key_scale = view(f.key_scale_offset, f.block_size, torch.float32)
            """float32 [num_blocks, kv_heads, block_size]"""

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token, all KV heads together."""
        return self.raw.shape[1] * self.format.bytes_per_token

    def projected_key(self, blocks: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Projected keys K^ of some blocks: float32 [*blocks.shape, kv_heads, stored, block_size], a copy.

        Args:
            sigma: float32 [kv_heads, stored].
        """
        key = self.key[blocks].float()
        if self.format.is_quantized:
            key = key * sigma[..., None] * self.key_scale[blocks][..., None, :]
        return key
