"""One worker's share of an engine: its layers, what happens between their steps, and what it counts."""

from pathlib import Path
from typing import Any

import torch
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lrqk import devices
from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.core.huge_pages import ask_for_huge_pages
from vllm_lrqk.core.layer import Layer, LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.step import FilledPages, Step, filled_pages
from vllm_lrqk.devices.pinned import PinnedMemory, device_address, release_all, released_with
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.report import report_of
from vllm_lrqk.integration.settings import engine_of, kv_dtype


class Worker:
    """What the layers of one KV-cache group share in one worker.

    Args:
        spec: of the group's layers.
    """

    def __init__(self, spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.engine = engine_of(vllm_config)
        self.layers: list[Layer] = []
        self._spec, self._device = spec, device
        self._plan = self.engine.method.plan(spec.head_size, kv_dtype(vllm_config), self.engine.group)
        self._impls = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        self.num_layers = len(layer_names)
        self.counters = Counters(self.engine.method.tallies, len(layer_names), device)
        self._filled: FilledPages | None = None
        self._in_huge_pages: set[int] = set()
        self._pinned = released_with(self)
        self._rank = vllm_config.parallel_config.rank
        self._world_size = vllm_config.parallel_config.world_size
        self.report = report_of(vllm_config)
        self.report.add(layer_names[0], self)
        compat.after_warm_up(self)
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
        if self._device.type == "cpu":
            self._use_huge_pages(blocks.untyped_storage())
        own = blocks.view(torch.uint8).flatten(2)
        other = None if companion is None else companion.view(torch.uint8).flatten(2)
        host = self._host_pages(shape, len(own))
        memory = LayerMemory(own, other, host) if self._plan.is_paged else LayerMemory(None, own, host)
        tallies, rest = self.counters.tallies[len(self.layers)], (workspace, self.counters)
        layer = self.engine.method.make_layer(shape, place, memory, *rest, tallies, self._device)
        self.layers.append(layer)
        if len(self.layers) == self.num_layers:
            self.layers[0].warm_up()
            self.report.layers_made(len(own))
        return layer

    def _use_huge_pages(self, storage: torch.UntypedStorage) -> None:
        """For what vLLM allocated and has written to; one storage may hold the blocks of many layers."""
        if storage.data_ptr() not in self._in_huge_pages:
            self._in_huge_pages.add(storage.data_ptr())
            ask_for_huge_pages(torch.empty(0, dtype=torch.uint8).set_(storage), is_written=True)

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

        Runs before the step or the replay of its graph, behind everything that the last step launched.
        """
        if self._filled is not None:
            self.layers[0].seal_all(self.layers, self._filled)
        self._filled = None if is_capture or not self._plan.is_paged else filled_pages(step)
        if is_capture:
            return
        self.counters.decode_tokens += step.num_decodes * self.num_layers
        self.report.begin_step(self, step)

    def begin_serving(self) -> None:
        """vLLM's warm-up requests are over."""
        self.report.begin_serving()

    def count_pages_in_use(self, step: Step) -> torch.Tensor:
        """Host pages that the requests hold, int64 [] on their device; the null page, 0, is none."""
        num_pages, table = self.engine.num_host_pages or 1, step.block_table
        index = torch.arange(table.shape[1], device=table.device)
        used = index < -(-step.seq_lens[: len(table), None] // self._plan.block_size)
        is_held = torch.zeros(num_pages, dtype=torch.int64, device=table.device)
        held = torch.where(used, table, 0).long().clamp_max(num_pages - 1)
        return is_held.scatter_(0, held.flatten(), 1)[1:].sum()

    def count(self, counts: dict[str, int]) -> dict[str, int]:
        """What is reported of the counts of this group."""
        row_bytes = 2 * self._spec.head_size * kv_dtype(self.vllm_config).itemsize
        return self.engine.method.count(counts, self._spec.num_kv_heads, row_bytes)

    def memory(self) -> dict[str, int]:
        """Bytes that this group's layers take."""
        heads, plan = self.num_layers * self._spec.num_kv_heads, self._plan
        return {
            "device_bytes_per_token": heads * plan.bytes_per_token if plan.is_paged else 0,
            "device_bytes_per_request": heads * plan.block_bytes * plan.blocks_per_request,
            "host_bytes_per_token": heads * plan.host_bytes_per_token,
        }

    def release(self) -> None:
        """Give the memory back to the system's use; no step may follow."""
        self.report.release()
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
        names = {name: type(impl).__name__ for name, impl in impls.items()}
        if not hasattr(self.vllm_config.additional_config, "engine"):  # type: ignore[attr-defined]
            return {"implementations": names}  # dense attention, which counts nothing
        report = report_of(self.vllm_config)  # type: ignore[attr-defined]
        return {"implementations": names, **report.memory(), **report.counts()}
