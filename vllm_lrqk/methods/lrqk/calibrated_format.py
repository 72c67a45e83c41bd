"""The byte format of a factor page of `factorization: "calibrated"`: every offset of it, in this one place.

A page belongs to one (block, KV head) and is one contiguous run of bytes in vLLM's own KV cache tensor. With N page
tokens, d head size and r columns of the key factor, of which the l leading ones have 8 bits and the others 4:

    offset 0                                                                  page_bytes
    | leading A    | trailing A    | scale    | value_mean | key_factor_mean | padding |
    | [l/4, N, 4]  | [(r-l)/8, N, 4] | [r]    | [d]        | [r]             |         |
    | int8         | two int4      | bfloat16 | bfloat16   | float16         |         |

    proxy score of token n for query q:  s~_n = sum_j z_j * scale_j * A_nj,  z = X' R(-p0) q   (times 1/sqrt(d))

X and p0, the page's first position, are not in the page: X is the layer's, and R(-p0) turns a query into the page's
frame (see `core/rotary.py`). With a value map of the page's own two sections follow key_factor_mean:

    | value_projection W | value_scale |
    | [r/4, d/2, 4]      | [r]         |
    | two int4           | bfloat16    |

    estimate of the value of token n:  v~_n = value_mean + sum_j (A_nj - key_factor_mean_j) * value_scale_j * W_j

Without them value_scale_j W_j is the layer's, times scale_j. A byte of two int4 has the first in its low half; stored
is the number plus 8. Of a 4-byte word of trailing A the low halves are columns 8 w ... 8 w + 3 and the high halves
columns 8 w + 4 ... 8 w + 7; of a word i of W, which has four columns, they are dimensions i and d/2 + i. Every section
starts at a multiple of 64 bytes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vllm_lrqk.methods.lrqk.calibrated_basis import CalibratedBasis
from vllm_lrqk.methods.lrqk.format import layout_values
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

ALIGNMENT = 64


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack_int4(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """uint8 of two integers from -8 to 7."""
    return (low.int() + 8 | high.int() + 8 << 4).to(torch.uint8)


def unpack_int4(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high int8 halves of uint8."""
    return (packed & 15).to(torch.int8) - 8, (packed >> 4).to(torch.int8) - 8


@dataclass(frozen=True)
class CalibratedFormat:
    """Sizes of one page. `leading_rank` is a multiple of 4, `trailing_rank` of 8, `head_size` of 2."""

    page_size: int
    head_size: int
    leading_rank: int = 16
    trailing_rank: int = 16
    has_value_map: bool = True
    has_linear_values: bool = True
    """Values follow the key factors, by a map of each page's own or by the calibration's."""

    @classmethod
    def from_config(cls, config: LRQKSettings, head_size: int) -> "CalibratedFormat":
        """The format of a layer with this head size."""
        is_linear = config.residual == "linear"
        has_map = is_linear and config.value_map == "page"
        return cls(config.page_size, head_size, config.rank, config.rank, has_map, is_linear)

    is_int8: ClassVar[bool] = True

    def layout_values(self, names: str) -> list[int]:
        """As `PageFormat.layout_values`."""
        return layout_values(self, names)

    @property
    def rank(self) -> int:
        return self.leading_rank + self.trailing_rank

    @property
    def value_rank(self) -> int:
        """Columns that values are estimated from: all, or none."""
        return self.rank if self.has_linear_values else 0

    @property
    def trailing_offset(self) -> int:
        return _align(self.page_size * self.leading_rank)

    @property
    def projection_scale_offset(self) -> int:
        return self.trailing_offset + _align(self.page_size * self.trailing_rank // 2)

    @property
    def value_mean_offset(self) -> int:
        return self.projection_scale_offset + _align(self.rank * 2)

    @property
    def key_factor_mean_offset(self) -> int:
        return self.value_mean_offset + _align(self.head_size * 2)

    @property
    def value_projection_offset(self) -> int:
        return self.key_factor_mean_offset + _align(self.rank * 2)

    @property
    def value_scale_offset(self) -> int:
        return self.value_projection_offset + _align(self.rank * self.head_size // 2)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and KV head, padding included; vLLM allocates page_size times this."""
        end = self.value_scale_offset + _align(self.rank * 2) if self.has_value_map else self.value_projection_offset
        step = max(1, ALIGNMENT // self.page_size)  # keeps page_bytes a multiple of ALIGNMENT
        return -(-end // (self.page_size * step)) * step

    @property
    def page_bytes(self) -> int:
        return self.bytes_per_token * self.page_size


class CalibratedPages:
    """Typed views into the factor pages of one layer, and the basis that they are in.

    Args:
        raw: uint8 [num_pages, kv_heads, page_bytes]; the last dimension contiguous.
        page_format: the format of each page.
        basis: of `page_format.rank` columns.
    """

    def __init__(self, raw: torch.Tensor, page_format: CalibratedFormat, basis: CalibratedBasis) -> None:
        f = page_format
        if raw.dtype != torch.uint8 or raw.shape[-1] != f.page_bytes or raw.stride(-1) != 1:
            raise ValueError(
                f"factor pages must be uint8 [pages, heads, {f.page_bytes}], got {raw.dtype} {tuple(raw.shape)}"
            )
        self.raw = raw
        self.format = f
        self.basis = basis

        def view(start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
            return raw[..., start : start + length * dtype.itemsize].view(dtype)

        self.leading_words = view(0, f.page_size * f.leading_rank, torch.int8).unflatten(
            -1, (f.leading_rank // 4, f.page_size, 4)
        )
        """int8 [num_pages, kv_heads, l / 4, page_size, 4]"""
        self.trailing_words = view(f.trailing_offset, f.page_size * f.trailing_rank // 2, torch.uint8).unflatten(
            -1, (f.trailing_rank // 8, f.page_size, 4)
        )
        """uint8 [num_pages, kv_heads, (r - l) / 8, page_size, 4]"""
        self.projection_scale = view(f.projection_scale_offset, f.rank, torch.bfloat16)
        """bfloat16 [num_pages, kv_heads, rank]"""
        self.value_mean = view(f.value_mean_offset, f.head_size, torch.bfloat16)
        """bfloat16 [num_pages, kv_heads, head_size]"""
        self.key_factor_mean = view(f.key_factor_mean_offset, f.rank, torch.float16)
        """float16 [num_pages, kv_heads, rank], in units of the stored elements"""
        if f.has_value_map:
            self.packed_value_projection = view(
                f.value_projection_offset, f.rank * f.head_size // 2, torch.uint8
            ).unflatten(-1, (f.rank // 4, f.head_size // 2, 4))
            """uint8 [num_pages, kv_heads, rank / 4, head_size / 2, 4]"""
            self.value_scale = view(f.value_scale_offset, f.rank, torch.bfloat16)
            """bfloat16 [num_pages, kv_heads, rank]"""

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token, all KV heads together."""
        return self.raw.shape[1] * self.raw.shape[2] / self.format.page_size

    def key_factor(self, pages: torch.Tensor) -> torch.Tensor:
        """Key factors A of some pages: int8 [*pages.shape, kv_heads, page_size, rank], a copy."""
        leading = self.leading_words[pages].transpose(-3, -2).flatten(-2)
        low, high = unpack_int4(self.trailing_words[pages])  # [..., KV, w, N, 4]
        trailing = torch.stack([low, high], -2).movedim(-4, -3).flatten(-3)  # [..., KV, N, w, 2, 4]
        return torch.cat([leading, trailing], -1)

    def write_key_factor(self, pages: torch.Tensor, key_factor: torch.Tensor) -> None:
        """Store key factors int8 [M, kv_heads, page_size, rank] of distinct pages."""
        leading, trailing = key_factor.split([self.format.leading_rank, self.format.trailing_rank], -1)
        self.leading_words[pages] = leading.unflatten(-1, (-1, 4)).transpose(-3, -2)
        words = trailing.unflatten(-1, (-1, 2, 4)).movedim(-3, -4)  # [M, KV, w, N, 2, 4]
        self.trailing_words[pages] = pack_int4(words[..., 0, :], words[..., 1, :])

    def value_projection(self, pages: torch.Tensor) -> torch.Tensor:
        """Value maps W of some pages: int8 [*pages.shape, kv_heads, rank, head_size], a copy."""
        low, high = unpack_int4(self.packed_value_projection[pages].transpose(-2, -1).flatten(-3, -2))
        return torch.cat([low, high], -1)

    def write_value_projection(self, pages: torch.Tensor, projection: torch.Tensor) -> None:
        """Store value maps int8 [M, kv_heads, rank, head_size] of distinct pages."""
        low, high = projection.chunk(2, -1)
        self.packed_value_projection[pages] = pack_int4(low, high).unflatten(-2, (-1, 4)).transpose(-2, -1)

    def value_map(self, pages: torch.Tensor) -> torch.Tensor:
        """What a step of each column of A adds to a value: float32 [*pages.shape, kv_heads, rank, head_size]."""
        if self.format.has_value_map:
            return self.value_projection(pages).float() * self.value_scale[pages].float()[..., None]
        return self.basis.value * self.projection_scale[pages].float()[..., None]
