"""The decoder of a CUDA device: rows through hot slots, nothing waits for the device."""

import torch

from vllm_lrqk.core.logits import Logits
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath
from vllm_lrqk.methods.lrqk.format import FactorPages


class CudaDecoder:
    """Decodes in parts of as many requests as the workspace serves at once.

    Args:
        host: [num_pages, KV, N, 2, d], in CPU memory registered with CUDA.
        path: shared by the layers of one worker.
    """

    decodes_one_per_request = True

    def __init__(
        self, factors: FactorPages, host: torch.Tensor, hot: DeviceHotCache, path: DecodePath, scale: float
    ) -> None:
        self.factors, self.host, self.hot, self.path, self.scale = factors, host, hot, path, scale

    def append(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        self.hot.append(key, value, self.host, slot_mapping)

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
        assert logits.is_plain, "refused at start-up"
        at_once, pages = self.path.workspace.max_requests, self.path.workspace.max_pages
        for start in range(0, len(query), at_once):
            part = slice(start, start + at_once)
            self.path.attend(
                query[part],
                key[part],
                value[part],
                self.host,
                self.factors,
                self.hot,
                block_table[part, :pages],
                hot_blocks[part],
                seq_lens[part],
                self.scale,
                output[part],
            )

    def warm_up(self) -> None:
        self.path.warm_up(self.host, self.factors, self.hot, self.scale)
