"""One attention layer's state on a CUDA device, and its part of a forward step: nothing waits for the device."""

from typing import TYPE_CHECKING

import torch

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer
from vllm_lrqk.device_step import DeviceStep
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.settings import LRQKConfig

if TYPE_CHECKING:  # needs Triton, which the CPU platform does not have
    from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath


class DeviceLayerState(Layer):
    """Factor pages and hot rows on the device, host pages that it can read and write.

    Args:
        host: [num_pages, KV, N, 2, d], in CPU memory registered with CUDA.
        path: shared by the layers of one worker.
    """

    hot: DeviceHotCache

    def __init__(
        self,
        factors: FactorPages,
        host: torch.Tensor,
        hot: DeviceHotCache,
        scale: float,
        config: LRQKConfig,
        counters: Counters,
        kernels: Kernels,
        path: "DecodePath",
    ) -> None:
        super().__init__(factors, host, hot, scale, config, counters, kernels)
        self.path = path

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: DeviceStep,
        hot_table: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Store the step's keys and values and attend; a batch of decode requests alone can be captured into a graph.

        Pages that prefill chunks fill are sealed here, those that decode tokens fill by `seal` before the next step.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
            hot_table: int32 [R, M], hot blocks of each request.
        """
        self.hot.append(key, value, self.host, step.slots)
        for chunk in step.prefill:
            self._prefill(query, key, value, chunk, output)
        at_once, pages = self.path.workspace.max_requests, self.path.workspace.max_pages
        for start in range(0, step.num_decodes, at_once):
            part = slice(start, min(start + at_once, step.num_decodes))
            self.path.attend(
                query[part],
                key[part],
                value[part],
                self.host,
                self.factors,
                self.hot,
                step.block_table[part, :pages],
                hot_table[part],
                step.seq_lens[part],
                self.scale,
                output[part],
            )

    def seal(self, pages: torch.Tensor) -> None:
        """Factorise pages, int64 [M] on the device, that decode tokens have filled."""
        self.kernels.seal_pages(pages, self.host, self.factors, None, self.config)
        self.counters.pages_sealed += len(pages)

    def warm_up(self) -> None:
        """Compile what is compiled at first use, by steps of padding alone."""
        self.path.warm_up(self.host, self.factors, self.hot, self.scale)
