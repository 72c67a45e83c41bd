"""The measurements of benchmarks/decode_cuda.py; needs a CUDA device."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from cuda_workload import Shape, Workload, copy_pages, make_workload
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_lrqk.devices import cuda_library, triton_parts
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.devices.pinned import PinnedMemory, device_address
from vllm_lrqk.methods.lrqk import cuda, triton_attend
from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath
from vllm_lrqk.methods.lrqk.decode import attend_selection, decode_attention
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
PROBE_BYTES = 1 << 30


class Bench:
    """Measures shapes of one configuration on the current device."""

    def __init__(self, config: LRQKSettings, repeats: int, miss_rates: list[float], step_miss_rate: float) -> None:
        try:
            self.operators = cuda_library.load()
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
        self.kernels = cuda.kernels(self.operators)
        self.config, self.repeats = config, repeats
        self.miss_rates, self.step_miss_rate = miss_rates, step_miss_rate
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)
        self.copy_bandwidth = self.pinned_bandwidth = 0.0

    def milliseconds(self, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
        """Median time of `call` on the device; `before` runs outside of it."""
        times = []
        for i in range(self.repeats + 3):
            before()
            self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end))
        return statistics.median(times)

    def card(self) -> dict[str, Any]:
        """The device's name and its bandwidths in bytes per second: copies (read and written), pinned reads."""
        source, target = (torch.empty(PROBE_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2))
        self.copy_bandwidth = 2e3 * PROBE_BYTES / self.milliseconds(lambda: target.copy_(source))
        host = torch.empty(PROBE_BYTES >> 17, 1, 256, 2, 128, dtype=torch.bfloat16)  # pages of 128 KiB
        memory = PinnedMemory(host, torch.cuda.cudart())
        device_address(host, self.operators)
        pages = torch.arange(len(host), device=self.device)
        output = target.view(torch.bfloat16).view(host.shape)
        stream = cuda_library.stream_handle(self.device)
        reads = {
            "pinned_kernel": lambda: self.operators.cuda_gather_pages(host, pages, output, stream),
            "pinned_copy": lambda: output.copy_(host, non_blocking=True),
        }
        measured = {name: 1e3 * PROBE_BYTES / self.milliseconds(call) for name, call in reads.items()}
        torch.cuda.synchronize()
        memory.release()
        self.pinned_bandwidth = max(measured.values())
        return {"name": torch.cuda.get_device_name(self.device), "copy": self.copy_bandwidth, **measured}

    def measure(self, shape: Shape) -> dict[str, Any]:
        """All figures of one shape."""
        pinned: list[PinnedMemory] = []

        def pin(host: torch.Tensor) -> torch.Tensor:
            pinned.append(PinnedMemory(host, torch.cuda.cudart()))
            device_address(host, self.operators)
            return host

        def seal(pages: torch.Tensor, host: torch.Tensor, factors: FactorPages) -> None:
            torch.cuda.synchronize()  # the pages were written by copies of the copy engine
            self.kernels.seal_pages(pages, host, factors, self.config)

        try:
            workload = make_workload(shape, self.config, self.device, seal, pin)
            return self._measure(workload)
        finally:
            torch.cuda.synchronize()
            for memory in pinned:
                memory.release()
            torch.cuda.empty_cache()

    def _measure(self, w: Workload) -> dict[str, Any]:
        shape, config = w.shape, self.config
        step = StepUnderTest(w, self.operators, self.device)
        row: dict[str, Any] = {"length": shape.length, "batch": shape.batch}
        row["device_share"] = shape.device_bytes(config) / shape.host_bytes(config)
        errors = []
        for _ in range(2):  # all rows missing, then all there
            step.run()
            errors.append(step.error())
        row["error"] = max(errors)
        row["is_right"] = row["error"] < MAX_ERROR[shape.dtype]
        if not row["is_right"]:
            return row
        select = lambda: step.path.workspace.select(w.query, w.factors, w.block_table, w.seq_lens, w.scale)  # noqa: E731
        row["select_ms"] = self.milliseconds(select)
        share = 1e3 * shape.factor_bytes(config) / row["select_ms"] / self.copy_bandwidth
        row["select_bandwidth_share"] = share
        row["attend_ms"] = self.milliseconds(step.attend)
        for rate in self.miss_rates:
            row[f"resolve_ms {rate:g}"] = self.milliseconds(step.resolve, lambda rate=rate: step.forget(rate))

            def prepare(rate: float = rate) -> None:
                step.forget(rate)
                step.resolve()

            row[f"fetch_ms {rate:g}"] = fetch = self.milliseconds(step.fetch, prepare)
            missed = int(step.resolved.miss_count.sum()) * step.hot.format.row_bytes
            row[f"fetch_bandwidth_share {rate:g}"] = 1e3 * missed / fetch / self.pinned_bandwidth if missed else None
        row["step_ms"] = self.milliseconds(step.run, lambda: step.forget(self.step_miss_rate))
        row["graph_ms"] = self.milliseconds(step.captured().replay, lambda: step.forget(self.step_miss_rate))
        row["kernels_us"] = kernel_times(step.run, lambda: step.forget(self.step_miss_rate))
        row |= self._comparisons(w, step)
        return row

    def _comparisons(self, w: Workload, step: "StepUnderTest") -> dict[str, Any]:
        """The same step in plain torch on device memory, dense attention, and dense attention from pinned memory."""
        free = torch.cuda.mem_get_info(self.device)[0]
        if 4 * w.host.nbytes > free:
            return dict.fromkeys(("dense_ms", "flash_ms", "offload_ms", "torch_ms", "dense_error"))
        pages = torch.empty_like(w.host, device=self.device)
        output = torch.empty_like(w.query)
        arguments = (w.query, pages, w.factors, w.block_table, w.seq_lens, w.scale, self.config, output)
        copy = self.milliseconds(lambda: copy_pages(pages, w.host))
        in_torch = self.milliseconds(lambda: decode_attention(*arguments))
        rows = pages[w.block_table.long()].transpose(1, 2).flatten(2, 3)[:, :, : w.shape.length]
        key, value = rows[:, :, :, 0].contiguous(), rows[:, :, :, 1].contiguous()
        step.forget(1.0)  # the parts were measured one by one, and left slots without their rows
        step.run()

        def dense() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                w.query[:, :, None], key, value, scale=w.scale, enable_gqa=True
            )

        difference = step.output.float() - dense()[:, :, 0].float()
        dense_error = float(difference.norm() / dense().float().norm())
        ms, flash_ms = self.milliseconds(dense), None
        if w.query.dtype != torch.float32:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                flash_ms = self.milliseconds(dense)
        measured = {"dense_ms": ms, "flash_ms": flash_ms, "offload_ms": ms + copy, "torch_ms": in_torch}
        return measured | {"dense_error": dense_error}


class StepUnderTest:
    """One decode step that can be run again: the current token is written to the same slot each time."""

    def __init__(self, w: Workload, operators: Any, device: torch.device) -> None:
        shape, config = w.shape, w.config
        form = shape.hot_format(config)
        per_request = form.blocks_for(config.num_hot_rows)
        blocks = shape.batch * per_request
        raw = torch.zeros(blocks, shape.kv_heads, form.block_bytes, dtype=torch.uint8, device=device)
        self.w = w
        self.hot = DeviceHotCache(operators, raw, form, len(w.host))
        self.hot_blocks = torch.arange(blocks, dtype=torch.int32, device=device).view(shape.batch, per_request)
        pages = w.block_table.shape[1]
        self.path = DecodePath(
            operators, shape.batch, pages, shape.heads, shape.kv_heads, form, per_request, config, device
        )
        self.resolved = self.path.resolved.first(shape.batch)
        self.output = torch.empty_like(w.query)
        self._chance = torch.empty(self.hot.tag.shape, device=device)

    def run(self) -> None:
        w = self.w
        self.selection = self.path.step(
            w.query, w.key, w.value, w.slot_mapping, w.host, w.factors, self.hot, w.block_table, self.hot_blocks,
            w.seq_lens, w.scale, self.output,
        )  # fmt: skip

    def resolve(self) -> None:
        w = self.w
        page_size = w.config.page_size
        self.hot.resolve(self.selection.positions, w.block_table, w.seq_lens, self.hot_blocks, page_size, self.resolved)

    def fetch(self) -> None:
        self.hot.fetch(self.w.host, self.w.key, self.w.value, self.resolved)

    def forget(self, rate: float) -> None:
        """Make a share of the slots hold nothing, so that as many rows miss."""
        self._chance.uniform_()
        self.hot.tag.sub_((self._chance < rate).int())  # a tag of another row and generation

    def captured(self) -> torch.cuda.CUDAGraph:
        """The step as a graph, which is how vLLM runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph

    def attend(self) -> None:
        w, parts = self.w, self.path._parts
        splits = self.path._splits(w.shape.batch)
        kinds = 1 if self.selection.residual is None else 2
        parts = parts.cut(w.shape.batch * w.shape.kv_heads, kinds * splits)
        left = (self.selection.residual, w.factors, w.block_table, self.selection.moment)
        triton_attend.attend_rows(w.query, self.hot.rows, self.resolved.address, w.scale, parts, 0, splits)
        if kinds == 2:
            triton_attend.attend_rows(w.query, self.hot.rows, None, w.scale, parts, splits, splits, *left)
        triton_parts.combine(parts, self.output)

    def error(self) -> float:
        """Of the output, against the plain torch form on the same rows (on the CPU, from the host pages)."""
        torch.cuda.synchronize()
        w, head = self.w, torch.arange(self.w.shape.kv_heads)[None, :, None]
        rows, table = self.selection.positions.cpu().long(), w.block_table.cpu().long()
        n = w.config.page_size
        page = table.gather(1, (rows.clamp_min(0) // n).flatten(1)).view_as(rows)
        rows_kv = w.host[page, head, rows.clamp_min(0) % n].to(w.query.device)
        expected = attend_selection(w.query, rows_kv, self.selection, w.factors, w.block_table, w.scale)
        return float((self.output.float() - expected).norm() / expected.norm())


def kernel_times(call: Callable[[], Any], before: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel that `call` launches, from torch's profiler."""
    before()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total for event in profile.key_averages()}
