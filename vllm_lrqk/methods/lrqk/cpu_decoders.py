"""Decoders where device and host memory are the same: the CPU platform, in plain torch or with its kernels."""

import torch

from vllm_lrqk.core.hot_rows import HotCache
from vllm_lrqk.core.logits import Logits
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.decode import attend_selection
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

TALLIES = ("rows_hit", "rows_missed", "rows_read_in_place")


class InPlaceDecoder:
    """Reads rows where they lie.

    Args:
        host: [num_pages, KV, N, 2, d].
        tallies: int64 [3], see `TALLIES`.
    """

    decodes_one_per_request = False

    def __init__(
        self,
        factors: FactorPages | CalibratedPages,
        host: torch.Tensor,
        kernels: Kernels,
        scale: float,
        config: LRQKSettings,
        tallies: torch.Tensor,
    ) -> None:
        self.factors, self.host, self.kernels = factors, host, kernels
        self.scale, self.config, self.tallies = scale, config, tallies

    def append(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        self.kernels.append_rows(key, value, self.host, slot_mapping)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        hot_blocks: torch.Tensor | None,
        output: torch.Tensor,
        logits: Logits,
    ) -> None:
        rows = self.kernels.decode_attention(
            query, self.host, self.factors, block_table, seq_lens, self.scale, self.config, output, logits
        )
        self.tallies[2] += rows.sum()

    def warm_up(self) -> None:
        return


class HotDecoder(InPlaceDecoder):
    """Reads rows through a hot cache, as a device with memory of its own does: the plain torch form of that."""

    decodes_one_per_request = True

    def __init__(
        self,
        factors: FactorPages | CalibratedPages,
        host: torch.Tensor,
        hot: HotCache,
        kernels: Kernels,
        scale: float,
        config: LRQKSettings,
        tallies: torch.Tensor,
    ) -> None:
        super().__init__(factors, host, kernels, scale, config, tallies)
        self.hot = hot
        self.clock = 0

    def append(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        super().append(key, value, slot_mapping)
        self.clock += 1
        self.hot.pages_written(slot_mapping, self.config.page_size)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        hot_blocks: torch.Tensor | None,
        output: torch.Tensor,
        logits: Logits,
    ) -> None:
        assert hot_blocks is not None
        selection = self.kernels.select(query, self.factors, block_table, seq_lens, self.scale, self.config, logits)
        rows, fetch = self.hot.resolve(selection.positions, self.host, block_table, hot_blocks, seq_lens, self.clock)
        output.copy_(attend_selection(query, rows, selection, self.factors, block_table, self.scale, logits))
        self.tallies[0] += fetch.hits
        self.tallies[1] += fetch.misses
