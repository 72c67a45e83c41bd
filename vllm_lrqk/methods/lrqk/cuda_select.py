"""Selection by the CUDA kernels, in memory that is allocated once."""

import math
from typing import Any

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.devices.cuda_library import stream_handle
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKConfig

MAX_RANK = 64
MAX_HEAD_SIZE = 256
MAX_TOKENS = 1 << 22
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_config(config: LRQKConfig) -> None:
    """Raise ConfigError where the CUDA kernels do not serve a setting."""
    if config.top_p < 1:
        raise ConfigError(f"lrqk.top_p is {config.top_p:g}, but the CUDA kernels have no adaptive budget: set it to 1.")


def is_supported(query: torch.Tensor, factors: FactorPages, block_table: torch.Tensor) -> bool:
    """Whether the CUDA kernels serve these shapes."""
    f = factors.format
    return (
        query.dtype in DTYPES
        and f.rank <= MAX_RANK
        and f.head_size <= MAX_HEAD_SIZE
        and f.head_size % 8 == 0
        and block_table.shape[1] * f.page_size < MAX_TOKENS
    )


class SelectWorkspace:
    """Memory of select for up to `max_requests` requests of up to `max_pages` pages.

    The layers of a model share one: what select returns is valid until the next call.

    Raises:
        ConfigError: the configuration asks for what the kernels do not have.
    """

    def __init__(
        self,
        operators: Any,
        max_requests: int,
        max_pages: int,
        heads: int,
        kv_heads: int,
        config: LRQKConfig,
        device: torch.device,
    ) -> None:
        check_config(config)
        self.operators = operators
        self.max_requests, self.max_pages = max_requests, max_pages
        self.heads, self.kv_heads = heads, kv_heads
        self.config = config
        state, scratch = operators.cuda_select_bytes(max_requests, heads, kv_heads, max_pages, config.page_size)
        self._state = torch.zeros(state, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(scratch, dtype=torch.uint8, device=device)
        self._rows = torch.empty(max_requests * kv_heads * config.attended_rows, dtype=torch.int32, device=device)
        self._residual = torch.empty(max_requests * heads * max_pages, device=device)
        columns = config.num_value_ranks
        self._residual_factor = torch.empty(max_requests * heads * max_pages * columns, device=device)

    @property
    def nbytes(self) -> int:
        buffers = (self._state, self._scratch, self._rows, self._residual, self._residual_factor)
        return sum(x.nbytes for x in buffers)

    def fits(self, query: torch.Tensor, block_table: torch.Tensor, kv_heads: int, config: LRQKConfig) -> bool:
        """Whether a call with these arguments has room."""
        same = (self.heads, self.kv_heads, self.config) == (query.shape[1], kv_heads, config)
        return same and len(query) <= self.max_requests and block_table.shape[1] <= self.max_pages

    def select(
        self,
        query: torch.Tensor,
        factors: FactorPages,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
    ) -> Selection:
        """As `score.select`, for all pages of the block table; rows are int32 [B, KV, attended_rows].

        Args:
            block_table: int32 [B, P].
            seq_lens: int32 [B]; 0 for padding, which selects nothing.
        """
        f, config, (requests, heads, _) = factors.format, self.config, query.shape
        rows_shape = (requests, self.kv_heads, config.attended_rows)
        rows = self._rows[: requests * self.kv_heads * config.attended_rows].view(rows_shape)
        residual = residual_factor = None
        residual_shape = (requests, heads, block_table.shape[1])
        places = math.prod(residual_shape)
        if config.residual != "none":
            residual = self._residual[:places].view(residual_shape)
        if config.residual == "linear":
            columns = factors.value_scale.shape[-1]
            residual_factor = self._residual_factor[: places * columns].view(*residual_shape, columns)
        self.operators.cuda_select(
            query,
            factors.raw,
            block_table,
            seq_lens,
            scale,
            f.rank,
            f.factor_dtype == torch.int8,
            f.projection_offset,
            f.scale_offset,
            f.page_size,
            config.top_k,
            config.recent_tokens,
            config.sink_tokens,
            rows,
            residual,
            residual_factor,
            self._state,
            self._scratch,
            self.max_requests,
            stream_handle(query.device),
        )
        return Selection(rows, residual, residual_factor)
