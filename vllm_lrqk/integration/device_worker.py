"""One worker's share of an engine on a CUDA device: pinned host pages, and what happens between captured steps."""

from typing import Any

import torch

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.device_counters import DeviceCounters
from vllm_lrqk.device_layer import DeviceLayerState
from vllm_lrqk.device_step import DeviceStep, filled_pages
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.devices.pinned import PinnedMemory, device_address, release_all, released_with
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.blocks import FactorSpec
from vllm_lrqk.integration.worker import WorkerState
from vllm_lrqk.methods.lrqk.format import FactorPages


class DeviceWorkerState(WorkerState):
    """State that the layers of one KV-cache group share in one worker.

    Args:
        operators: of the CUDA kernels.
    """

    def __init__(
        self, spec: FactorSpec, layer_names: list[str], vllm_config: Any, device: torch.device, operators: Any
    ) -> None:
        super().__init__(spec, layer_names, vllm_config)
        self._device, self._operators = device, operators
        self._device_counters = DeviceCounters(len(layer_names), device)
        self._layers: list[DeviceLayerState] = []
        self._filled: torch.Tensor | None = None
        self._pinned = released_with(self)
        self.vllm_config = vllm_config
        compat.release_at_worker_shutdown(self)

    def _join(
        self, factors: FactorPages, host: torch.Tensor, hot_bytes: torch.Tensor | None, scale: float, path: Any
    ) -> DeviceLayerState:
        from vllm_lrqk.methods.lrqk import cuda

        assert hot_bytes is not None
        if self._device.type == "cuda":
            self._pinned.append(PinnedMemory(host, torch.cuda.cudart()))
            device_address(host, self._operators)
        counts = self._device_counters.rows[len(self._layers)]
        hot = DeviceHotCache(self._operators, hot_bytes, self._hot_format, len(host), counts)
        kernels = cuda.kernels(self._operators)
        layer = DeviceLayerState(factors, host, hot, scale, self._config, self.counters, kernels, path)
        self._layers.append(layer)
        return layer

    def release(self) -> None:
        """Give the host memory back to the system's use; no step may follow."""
        release_all(self._pinned)
        self._pinned.clear()

    def _all_created(self) -> None:
        self._layers[0].warm_up()

    def begin_step(self, step: DeviceStep, is_capture: bool) -> None:
        """Seal the pages that the last step's decode tokens filled, and note those of this one.

        Runs before the step or the replay of its graph, behind everything that the last step launched. At vLLM's
        logging interval begins to copy the counts, and logs them once they are there: nothing waits for the device.
        """
        if self._filled is not None:
            for layer in self._layers:
                layer.seal(self._filled)
        self._filled = None if is_capture else filled_pages(step)
        if is_capture:
            return
        self.step += 1
        self.counters.decode_tokens += step.num_decodes * self._num_layers
        counts = self._device_counters.arrived()
        if counts is not None:
            self.pages_in_use = counts.pages_in_use
            self._note_rows(counts.rows_hit, counts.rows_missed)
            self._log_recent()
        elif self._is_time_to_log() and not self._device_counters.is_copying:
            self._device_counters.start_copy(self._count_pages(step.block_table, step.seq_lens))

    def read_counters(self) -> Counters:
        """Counters since start-up; waits for the device."""
        self._note_rows(*self._device_counters.wait())
        return self.counters

    def _note_rows(self, hit: int, missed: int) -> None:
        counters = self.counters
        counters.rows_hit, counters.rows_missed = hit, missed
        # The current token's row is attended but comes from no cache and no host page.
        counters.rows_attended = hit + missed + counters.decode_tokens * self._spec.num_kv_heads
        counters.bytes_fetched = missed * self._hot_format.row_bytes
