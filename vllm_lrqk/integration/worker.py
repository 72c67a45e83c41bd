"""One worker's share of an engine: its layers' state, counters and log lines."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vllm_lrqk.core.capture import LayerCapture, LayerShape
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.core.hot_rows import HotCache
from vllm_lrqk.core.layer import LayerState
from vllm_lrqk.device_layer import DeviceLayerState
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.blocks import FactorSpec, hot_format, page_format
from vllm_lrqk.integration.startup import check_host_memory, host_plan, kv_dtype, read_config
from vllm_lrqk.methods.lrqk.format import FactorPages

logger = compat.logger("lrqk")


class WorkerState:
    """State that the layers of one KV-cache group share in one worker."""

    def __init__(self, spec: FactorSpec, layer_names: list[str], vllm_config: Any) -> None:
        self.counters = Counters()
        self.pages_in_use = 0
        self.step = 0
        self._spec = spec
        self._config = read_config(vllm_config)
        self._plan = host_plan(vllm_config)
        self._dtype = kv_dtype(vllm_config)
        self._hot_format = hot_format(self._config, spec.head_size, self._dtype)
        self._waiting = set(layer_names)
        self._num_layers = len(layer_names)
        self._rank = vllm_config.parallel_config.rank
        self._world_size = vllm_config.parallel_config.world_size
        self._logged = Counters()
        self._logged_at = time.monotonic()
        self._interval = float(os.environ.get("VLLM_LOG_STATS_INTERVAL", "10"))
        check_host_memory(self._plan, self._config, vllm_config.model_config.max_model_len)

    def create_state(
        self, name: str, raw: torch.Tensor, hot_raw: torch.Tensor | None, scale: float, path: Any
    ) -> LayerState | DeviceLayerState:
        """Allocate a layer's host pages and join them with the tensors that vLLM allocated.

        Args:
            raw: [num_blocks, KV, N, bytes per token], the layer's factor pages.
            hot_raw: the same shape, its companion's hot blocks.
            path: the worker's `DecodePath`, on a CUDA device.
        """
        spec, head_size = self._spec, self._spec.head_size
        num_pages = min(raw.shape[0], spec.host_pages)
        host = allocate_host_pages(num_pages, spec.num_kv_heads, spec.block_size, head_size, self._dtype)
        factors = FactorPages(raw.view(torch.uint8).flatten(2), page_format(self._config, head_size))
        hot_bytes = None if hot_raw is None else hot_raw.view(torch.uint8).flatten(2)
        state = self._join(factors, host, hot_bytes, scale, path)
        self._waiting.discard(name)
        if not self._waiting:
            self._all_created()
            if self._rank == 0:
                self._log_start(state.kernels.name, raw.shape[0], num_pages)
        return state

    def create_capture(self, name: str, heads: int, scale: float) -> LayerCapture | None:
        """What writes the tokens of a layer to files, if that is asked for."""
        config, spec = self._config, self._spec
        if config.capture is None:
            return None
        dtype = str(self._dtype).removeprefix("torch.")
        shape = LayerShape(heads, spec.num_kv_heads, spec.head_size, dtype, scale)
        file_name = name if self._world_size == 1 else f"{name}-rank{self._rank}"
        return LayerCapture(Path(config.capture), file_name, shape, config.capture_tokens)

    def _join(
        self, factors: FactorPages, host: torch.Tensor, hot_bytes: torch.Tensor | None, scale: float, path: Any
    ) -> LayerState | DeviceLayerState:
        hot = None if hot_bytes is None else HotCache(hot_bytes, self._hot_format, len(host))
        return LayerState(factors, host, hot, scale, self._config, self.counters)

    def _all_created(self) -> None:
        """Called once every layer has its state."""

    def _log_start(self, kernels: str, num_blocks: int, num_pages: int) -> None:
        page_size = self._spec.block_size
        device_bytes = self._num_layers * self._spec.page_size_bytes / page_size
        host_bytes = self._plan.page_bytes / page_size
        logger.info(
            "LRQK (%s kernels): %.0f device bytes and %.0f host bytes per token and rank; room for %s tokens "
            "(host memory holds %s, device memory %s); dense attention would have had %s in the same device memory.",
            kernels,
            device_bytes,
            host_bytes,
            f"{(num_pages - 1) * page_size:,}",
            f"{(self._plan.num_pages - 1) * page_size:,}",
            f"{num_blocks * page_size:,}",
            f"{int(num_blocks * page_size * device_bytes / host_bytes):,}",
        )

    def next_step(self, block_table: torch.Tensor, seq_lens: torch.Tensor) -> int:
        """Count a step; at vLLM's logging interval log what happened since the last time."""
        self.step += 1
        if self._is_time_to_log():
            self.pages_in_use = int(self._count_pages(block_table, seq_lens))
            self._log_recent()
        return self.step

    def read_counters(self) -> Counters:
        """Counters since start-up."""
        return self.counters

    def _is_time_to_log(self) -> bool:
        return self._rank == 0 and time.monotonic() - self._logged_at >= self._interval

    def _log_recent(self) -> None:
        now = time.monotonic()
        self._log(self.counters.since(self._logged), now - self._logged_at)
        self._logged, self._logged_at = self.counters.since(Counters()), now

    def _count_pages(self, block_table: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """Host pages that the requests hold, int64 [] on their device; the null page, 0, is none."""
        index = torch.arange(block_table.shape[1], device=block_table.device)
        used = index < -(-seq_lens[:, None] // self._spec.block_size)
        is_held = torch.zeros(self._spec.host_pages, dtype=torch.int64, device=block_table.device)
        held = torch.where(used, block_table, 0).long().clamp_max(self._spec.host_pages - 1)
        return is_held.scatter_(0, held.flatten(), 1)[1:].sum()

    def _log(self, recent: Counters, seconds: float) -> None:
        logger.info(
            "LRQK: rows attended %s, hit %s, missed %s (hit rate %.1f %%), fetched %.1f MiB (%.1f MiB/s), "
            "host pages in use %s.",
            f"{recent.rows_attended:,}",
            f"{recent.rows_hit:,}",
            f"{recent.rows_missed:,}",
            100 * recent.hit_rate,
            recent.bytes_fetched / 2**20,
            recent.bytes_fetched / 2**20 / seconds,
            f"{self.pages_in_use:,}",
        )


class WorkerExtension:
    """Methods added to vLLM's worker, for `LLM.collective_rpc`."""

    def lrqk_counters(self) -> dict[str, Any]:
        """Counters since start-up of this rank, and the attention backend that each layer runs."""
        layers = self.vllm_config.compilation_config.static_forward_context  # type: ignore[attr-defined]
        impls = {name: layer.impl for name, layer in layers.items() if hasattr(layer, "impl")}
        workers = [impl.worker for impl in impls.values() if getattr(impl, "worker", None) is not None]
        states = [impl.state for impl in impls.values() if getattr(impl, "state", None) is not None]
        counters = workers[0].read_counters() if workers else Counters()
        tokens = states[0].host.shape[0] * states[0].host.shape[2] if states else 1
        return {
            "implementations": {name: type(impl).__name__ for name, impl in impls.items()},
            "host_bytes_per_token": sum(state.host.nbytes for state in states) / tokens,
            "device_bytes_per_token": sum(state.factors.bytes_per_token for state in states),
            "hot_bytes_per_request": sum(state.hot_bytes_per_request for state in states),
            **asdict(counters),
        }
