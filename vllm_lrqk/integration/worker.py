"""One worker's share of an engine: its layers, what happens between their steps, counters and log lines."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lrqk import devices
from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.core.layer import Layer, LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.step import Step, filled_pages
from vllm_lrqk.devices.pinned import PinnedMemory, device_address, release_all, released_with
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.settings import engine_of, kv_dtype
from vllm_lrqk.integration.startup import start_line

logger = compat.logger("lrqk")


class Worker:
    """What the layers of one KV-cache group share in one worker.

    Args:
        spec: of the group's layers.
    """

    def __init__(self, spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.engine = engine_of(vllm_config)
        self.layers: list[Layer] = []
        self.pages_in_use = 0
        self._spec, self._device = spec, device
        self._plan = self.engine.method.plan(spec.head_size, kv_dtype(vllm_config), self.engine.group)
        self._impls = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        self._num_layers = len(layer_names)
        self.counters = Counters(self.engine.method.tallies, len(layer_names), device)
        self._filled: torch.Tensor | None = None
        self._pinned = released_with(self)
        self._rank = vllm_config.parallel_config.rank
        self._world_size = vllm_config.parallel_config.world_size
        self._logged, self._logged_at = self._count(self.counters.wait()), time.monotonic()
        self._interval = float(os.environ.get("VLLM_LOG_STATS_INTERVAL", "10"))
        compat.release_at_worker_shutdown(self)

    def create_layer(
        self,
        shape: LayerShape,
        place: LayerPlace,
        blocks: torch.Tensor,
        companion: torch.Tensor | None,
        workspace: Any,
    ) -> Layer:
        """Join a layer's host pages with the tensors that vLLM allocated.

        Args:
            blocks: [num_blocks, KV, N, bytes per token], of the layer itself.
            companion: the same shape, of the companion that owns the request blocks.
            workspace: what the method made for layers of this shape.
        """
        own = blocks.view(torch.uint8).flatten(2)
        other = None if companion is None else companion.view(torch.uint8).flatten(2)
        host = self._host_pages(shape, len(own))
        memory = LayerMemory(own, other, host) if self._plan.is_paged else LayerMemory(None, own, host)
        tallies, rest = self.counters.tallies[len(self.layers)], (workspace, self.counters)
        layer = self.engine.method.make_layer(shape, place, memory, *rest, tallies, self._device)
        self.layers.append(layer)
        if len(self.layers) == self._num_layers:
            self.layers[0].warm_up()
            if self._rank == 0:
                heads = self._spec.num_kv_heads
                logger.info(start_line(self.vllm_config, self._num_layers, heads, layer.kernels_name, len(own)))
        return layer

    def _host_pages(self, shape: LayerShape, num_blocks: int) -> torch.Tensor | None:
        if self.engine.num_host_pages is None:
            return None
        num_pages = min(num_blocks, self.engine.num_host_pages)
        if self._device.type == "cuda" and self.vllm_config.cache_config.num_gpu_blocks is None:
            num_pages = min(num_pages, 2)  # vLLM profiles graphs, whose steps write to no page but the null block's
        host = allocate_host_pages(num_pages, shape.kv_heads, self._plan.block_size, shape.head_size, shape.torch_dtype)
        if self._device.type == "cuda":
            self._pinned.append(PinnedMemory(host, torch.cuda.cudart()))
            device_address(host, devices.cuda_operators(self._device))
        return host

    def create_capture(self, name: str, shape: LayerShape) -> LayerCapture | None:
        """What writes the tokens of a layer to files, if that is asked for."""
        settings = self.engine.method.settings
        if settings.capture is None:
            return None
        file_name = name if self._world_size == 1 else f"{name}-rank{self._rank}"
        return LayerCapture(Path(settings.capture), file_name, shape, settings.capture_tokens)

    def begin_step(self, step: Step, is_capture: bool) -> None:
        """Seal the pages that the last step's decode tokens filled, and note those of this one.

        Runs before the step or the replay of its graph, behind everything that the last step launched. At vLLM's
        logging interval begins to copy the counts, and logs them once they are there: nothing waits for the device.
        """
        if self._filled is not None:
            for layer in self.layers:
                layer.seal(self._filled)
        self._filled = None if is_capture or not self._plan.is_paged else filled_pages(step)
        if is_capture:
            return
        self.counters.decode_tokens += step.num_decodes * self._num_layers
        if self._rank == 0:
            self._log(step)

    def _log(self, step: Step) -> None:
        arrived = self.counters.arrived()
        if arrived is not None:
            counts, self.pages_in_use = arrived
            now, counts = time.monotonic(), self._count(counts)
            recent = {name: value - self._logged[name] for name, value in counts.items()}
            line = f"{self.engine.method.name}: {self.engine.method.describe(recent, now - self._logged_at)}"
            pages = "" if self.engine.num_host_pages is None else f", host pages in use {self.pages_in_use:,}"
            logger.info("%s%s.", line, pages)
            self._logged, self._logged_at = counts, now
        if time.monotonic() - self._logged_at >= self._interval and not self.counters.is_copying:
            self.counters.start_copy(self._pages_in_use(step))

    def _pages_in_use(self, step: Step) -> torch.Tensor:
        """Host pages that the requests hold, int64 [] on their device; the null page, 0, is none."""
        num_pages, table = self.engine.num_host_pages or 1, step.block_table
        index = torch.arange(table.shape[1], device=table.device)
        used = index < -(-step.seq_lens[: len(table), None] // self._plan.block_size)
        is_held = torch.zeros(num_pages, dtype=torch.int64, device=table.device)
        held = torch.where(used, table, 0).long().clamp_max(num_pages - 1)
        return is_held.scatter_(0, held.flatten(), 1)[1:].sum()

    def _count(self, counts: dict[str, int]) -> dict[str, int]:
        row_bytes = 2 * self._spec.head_size * kv_dtype(self.vllm_config).itemsize
        return self.engine.method.count(counts, self._spec.num_kv_heads, row_bytes)

    def report(self) -> dict[str, float]:
        """Bytes of this group's layers, and counts since start-up; waits for the device."""
        heads, plan = self._num_layers * self._spec.num_kv_heads, self._plan
        return {
            "device_bytes_per_token": heads * plan.bytes_per_token if plan.is_paged else 0,
            "device_bytes_per_request": heads * plan.block_bytes * plan.blocks_per_request,
            "host_bytes_per_token": heads * plan.host_bytes_per_token,
            **self._count(self.counters.wait()),
        }

    def release(self) -> None:
        """Give the memory back to the system's use; no step may follow."""
        release_all(self._pinned)
        self._pinned.clear()
        self.layers.clear()
        for impl in self._impls:
            impl.release()


class WorkerExtension:
    """Methods added to vLLM's worker, for `LLM.collective_rpc`."""

    def lrqk_counters(self) -> dict[str, Any]:
        """Counters since start-up of this rank, and the attention backend that each layer runs."""
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        impls = {name: layer.impl for name, layer in layers.items() if hasattr(layer, "impl")}
        workers = {impl.worker for impl in impls.values() if getattr(impl, "worker", None) is not None}
        total: dict[str, Any] = {}
        for report in (worker.report() for worker in workers):
            for name, value in report.items():
                total[name] = total.get(name, 0) + value
        return {"implementations": {name: type(impl).__name__ for name, impl in impls.items()}, **total}
