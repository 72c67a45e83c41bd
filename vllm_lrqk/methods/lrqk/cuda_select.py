"""Selection by the CUDA kernels, in memory that is allocated once."""

import math
from typing import Any

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.selection import Selection
from vllm_lrqk.devices.cuda_library import stream_handle
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

MAX_RANK = 64
MAX_HEAD_SIZE = 256
MAX_TOKENS = 1 << 22


def check_config(config: LRQKSettings) -> None:
    """Raise ConfigError where the CUDA kernels do not serve a setting."""
    if config.top_p < 1:
        raise ConfigError(f"lrqk.top_p is {config.top_p:g}, but the CUDA kernels have no adaptive budget: set it to 1.")


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
        config: LRQKSettings,
        device: torch.device,
    ) -> None:
        check_config(config)
        self.operators = operators
        self.max_requests, self.max_pages = max_requests, max_pages
        self.heads, self.kv_heads = heads, kv_heads
        self.config = config
        self._layout_names = operators.cuda_page_layout_names()
        state, scratch = operators.cuda_select_bytes(max_requests, heads, kv_heads, max_pages, config.page_size)
        self._state = torch.zeros(state, dtype=torch.uint8, device=device)
        self._scratch = torch.empty(scratch, dtype=torch.uint8, device=device)
        self._positions = torch.empty(max_requests * kv_heads * config.attended_rows, dtype=torch.int32, device=device)
        self._residual = torch.empty(max_requests * heads * max_pages, dtype=torch.float32, device=device)
        moments = max_requests * heads * max_pages * config.num_value_ranks
        self._moment = torch.empty(moments, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        buffers = (self._state, self._scratch, self._positions, self._residual, self._moment)
        return sum(x.nbytes for x in buffers)

    def select(
        self,
        query: torch.Tensor,
        factors: FactorPages,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
    ) -> Selection:
        """As `score.select`, for all pages of the block table; positions are int32 [B, KV, attended_rows].

        Args:
            block_table: int32 [B, P].
            seq_lens: int32 [B]; 0 for padding, which selects nothing.
        """
        f, config, (requests, heads, _) = factors.format, self.config, query.shape
        positions_shape = (requests, self.kv_heads, config.attended_rows)
        positions = self._positions[: requests * self.kv_heads * config.attended_rows].view(positions_shape)
        residual = moment = None
        residual_shape = (requests, heads, block_table.shape[1])
        pages = math.prod(residual_shape)
        if config.residual != "none":
            residual = self._residual[:pages].view(residual_shape)
        if config.residual == "linear":
            moment = self._moment[: pages * f.value_rank].view(*residual_shape, f.value_rank)
        self.operators.cuda_select(
            query,
            factors.raw,
            block_table,
            seq_lens,
            scale,
            f.layout_values(self._layout_names),
            f.page_size,
            config.top_k,
            config.recent_tokens,
            config.sink_tokens,
            positions,
            residual,
            moment,
            self._state,
            self._scratch,
            self.max_requests,
            stream_handle(query.device),
        )
        return Selection(positions, residual, moment)
