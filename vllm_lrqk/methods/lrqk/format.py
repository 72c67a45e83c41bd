"""The byte format of a factor page: every offset of it, in this one place.

A factor page belongs to one (block, KV head) and is one contiguous run of bytes in vLLM's own
KV cache tensor. With N page tokens, d head size, r rank and w = 4 / itemsize elements per
4-byte word (w = 4 for int8, 2 for bfloat16):

    offset 0                                                       page_bytes
    | key_factor A        | projection X | scale    | value_mean  | padding |
    | [r/w, N, w]         | [r, d]       | [r]      | [d]         |         |
    | int8 or bfloat16    | as A         | float32  | bfloat16    |         |

    proxy score of token n for query q:  s~_n = sum_j (q . X_j) * scale_j * A_nj   (times 1/sqrt(d))

With a value_rank v above 0 three sections follow value_mean:

    | value_projection W  | value_scale | key_factor_mean |
    | [v, d]              | [v]         | [v]             |
    | as A                | float32     | float32         |

    estimate of the value of token n:  v~_n = value_mean + sum_{j<v} (A_nj - key_factor_mean_j) * value_scale_j * W_j

A is stored in 4-byte words so that a SIMD register or a GPU warp reads the same word of
consecutive tokens in one access. `scale` is the product of the column scales of A and X (1 for bfloat16).
Every section starts at a multiple of 64 bytes (one cache line).
"""

from dataclasses import dataclass

import torch

from vllm_lrqk.methods.lrqk.settings import LRQKSettings

ALIGNMENT = 64


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def layout_values(page_format: object, names: str) -> list[int]:
    """Attributes of a page format by their names, each followed by a comma; 0 for those that it lacks."""
    return [int(getattr(page_format, name, 0)) for name in names.split(",") if name]


@dataclass(frozen=True)
class PageFormat:
    """Sizes of one factor page. `factor_dtype` is torch.int8 or torch.bfloat16."""

    page_size: int
    head_size: int
    rank: int
    factor_dtype: torch.dtype = torch.int8
    value_rank: int = 0
    """Leading columns of the key factor that values are estimated from; 0: the mean value alone."""

    @classmethod
    def from_config(cls, config: LRQKSettings, head_size: int) -> "PageFormat":
        """The format of a layer with this head size."""
        dtype = getattr(torch, config.factor_dtype)
        return cls(config.page_size, head_size, config.rank, dtype, config.num_value_ranks)

    @property
    def is_int8(self) -> bool:
        return self.factor_dtype == torch.int8

    def layout_values(self, names: str) -> list[int]:
        """What the compiled kernels know of this format.

        Args:
            names: attributes in the order of the library's PageLayout (csrc/layout.h), each followed by a comma; what
                only other formats have is 0.
        """
        return layout_values(self, names)

    @property
    def word_elements(self) -> int:
        return 4 // self.factor_dtype.itemsize

    @property
    def projection_offset(self) -> int:
        return _align(self.page_size * self.rank * self.factor_dtype.itemsize)

    @property
    def projection_scale_offset(self) -> int:
        return self.projection_offset + _align(self.rank * self.head_size * self.factor_dtype.itemsize)

    @property
    def value_mean_offset(self) -> int:
        return self.projection_scale_offset + _align(self.rank * 4)

    @property
    def value_projection_offset(self) -> int:
        return self.value_mean_offset + _align(self.head_size * 2)

    @property
    def value_scale_offset(self) -> int:
        return self.value_projection_offset + _align(self.value_rank * self.head_size * self.factor_dtype.itemsize)

    @property
    def key_factor_mean_offset(self) -> int:
        return self.value_scale_offset + _align(self.value_rank * 4)

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and KV head, padding included; vLLM allocates page_size times this."""
        needed = self.value_projection_offset
        if self.value_rank:
            needed = self.key_factor_mean_offset + _align(self.value_rank * 4)
        step = max(1, ALIGNMENT // self.page_size)  # keeps page_bytes a multiple of ALIGNMENT
        return -(-needed // (self.page_size * step)) * step

    @property
    def page_bytes(self) -> int:
        return self.bytes_per_token * self.page_size


class FactorPages:
    """Typed views into the factor pages of one layer.

    Args:
        raw: uint8 [num_pages, kv_heads, page_bytes]; the last dimension contiguous.
        page_format: the format of each page.
    """

    def __init__(self, raw: torch.Tensor, page_format: PageFormat) -> None:
        f = page_format
        if raw.dtype != torch.uint8 or raw.shape[-1] != f.page_bytes or raw.stride(-1) != 1:
            raise ValueError(
                f"factor pages must be uint8 [pages, heads, {f.page_bytes}], got {raw.dtype} {tuple(raw.shape)}"
            )
        self.raw = raw
        self.format = f

        def view(start: int, length: int, dtype: torch.dtype) -> torch.Tensor:
            return raw[..., start : start + length * dtype.itemsize].view(dtype)

        self.key_factor_words = view(0, f.page_size * f.rank, f.factor_dtype).unflatten(
            -1, (f.rank // f.word_elements, f.page_size, f.word_elements)
        )
        """[num_pages, kv_heads, rank / w, page_size, w]"""
        self.projection = view(f.projection_offset, f.rank * f.head_size, f.factor_dtype).unflatten(
            -1, (f.rank, f.head_size)
        )
        """[num_pages, kv_heads, rank, head_size]"""
        self.projection_scale = view(f.projection_scale_offset, f.rank, torch.float32)
        """float32 [num_pages, kv_heads, rank]"""
        self.value_mean = view(f.value_mean_offset, f.head_size, torch.bfloat16)
        """bfloat16 [num_pages, kv_heads, head_size]"""
        if f.value_rank:
            elements = f.value_rank * f.head_size
            self.value_projection = view(f.value_projection_offset, elements, f.factor_dtype).unflatten(
                -1, (f.value_rank, f.head_size)
            )
            """[num_pages, kv_heads, value_rank, head_size]"""
            self.value_scale = view(f.value_scale_offset, f.value_rank, torch.float32)
            """float32 [num_pages, kv_heads, value_rank]"""
            self.key_factor_mean = view(f.key_factor_mean_offset, f.value_rank, torch.float32)
            """float32 [num_pages, kv_heads, value_rank], in units of the stored elements"""

    def key_factor(self, pages: torch.Tensor) -> torch.Tensor:
        """Key factors A of some pages: [*pages.shape, kv_heads, page_size, rank], a copy."""
        words = self.key_factor_words[pages]  # [..., KV, r/w, N, w]
        return words.transpose(-3, -2).flatten(-2)

    def value_map(self, pages: torch.Tensor) -> torch.Tensor:
        """What a step of each column of A adds to a value: float32 [*pages.shape, kv_heads, value_rank, head_size]."""
        return self.value_projection[pages].float() * self.value_scale[pages][..., None]
