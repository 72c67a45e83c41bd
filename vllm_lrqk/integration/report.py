"""What one rank tells its operator: the start-up line, a line per logging interval, and series for `/metrics`."""

import os
import threading
import time
import weakref
from typing import Any, Protocol

import torch

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer
from vllm_lrqk.core.step import Step
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.metrics import Series, Writer
from vllm_lrqk.integration.settings import engine_of
from vllm_lrqk.integration.startup import start_line

logger = compat.logger("lrqk")
PUBLISH_SECONDS = 1.0
"""Between two looks at the counts for `/metrics`."""


class Group(Protocol):
    """Layers of one shape in one worker."""

    layers: list[Layer]
    num_layers: int
    counters: Counters

    def count(self, counts: dict[str, int]) -> dict[str, int]:
        """What is reported of the counts."""

    def memory(self) -> dict[str, int]:
        """Bytes that the layers take."""

    def count_pages_in_use(self, step: Step) -> torch.Tensor:
        """Host pages that the requests of a step hold, int64 [] on their device."""


class Report:
    """Adds up the groups of layers of one rank: layers with other KV-head counts are groups of their own."""

    def __init__(self, vllm_config: Any) -> None:
        self.engine = engine_of(vllm_config)
        self.groups: dict[str, Group] = {}
        """By the name of each group's first layer."""
        self.pages_in_use = 0
        self._vllm_config = weakref.ref(vllm_config)
        self._rank = vllm_config.parallel_config.rank
        self._interval = float(os.environ.get("VLLM_LOG_STATS_INTERVAL", "10"))
        self.is_serving = False
        """Whether vLLM's warm-up requests are over."""
        self._before_serving: dict[str, int] = {}
        self._arrived: dict[str, tuple[dict[str, int], int]] = {}
        self._logged: dict[str, int] = {}
        self._logged_at = time.monotonic()
        self._publisher: Publisher | None = None

    def add(self, layer_name: str, group: Group) -> None:
        """Take in a group, in the place of what it was before vLLM allocated its memory anew."""
        self.groups[layer_name] = group
        self._logged_at = time.monotonic()

    def layers_made(self, num_blocks: int) -> None:
        """Write the start-up line once all layers of all groups are there.

        Args:
            num_blocks: of vLLM's pool.
        """
        vllm_config = self._vllm_config()
        groups = self.groups.values()
        is_complete = all(len(group.layers) == group.num_layers for group in groups)
        if self._rank or vllm_config is None or not is_complete or not self._are_all_groups(vllm_config):
            return
        names = sorted({layer.kernels_name for group in groups for layer in group.layers})
        logger.info(start_line(vllm_config, " and ".join(names), num_blocks))
        for hint in sorted({layer.kernels_hint for group in groups for layer in group.layers} - {""}):
            logger.warning("%s: %s", self.engine.method.name, hint)

    def _are_all_groups(self, vllm_config: Any) -> bool:
        layers = vllm_config.compilation_config.static_forward_context.values()
        impls = [layer.impl for layer in layers if hasattr(getattr(layer, "impl", None), "worker")]
        return len(impls) == sum(group.num_layers for group in self.groups.values())

    def begin_step(self, group: Group, step: Step) -> None:
        """At vLLM's logging interval begin to copy the counts, and log them once they are there.

        Nothing waits for the device.
        """
        first = next(iter(self.groups.values()))
        if group is not first:
            return
        if self._publisher is None:
            self._publisher = Publisher.begin(self)
        if self._rank:
            return
        for name, own in self.groups.items():
            found = own.counters.arrived()
            if found is not None:
                self._arrived[name] = found
        if len(self._arrived) == len(self.groups):
            self._log([self._arrived.pop(name) for name in self.groups])
        is_copying = self._arrived or any(own.counters.is_copying for own in self.groups.values())
        if not is_copying and time.monotonic() - self._logged_at >= self._interval:
            for own in self.groups.values():
                own.counters.start_copy(own.count_pages_in_use(step))

    def _log(self, arrived: list[tuple[dict[str, int], int]]) -> None:
        method, now = self.engine.method, time.monotonic()
        self.pages_in_use = max(pages for _, pages in arrived)  # groups share their pages
        counts = self._total([counts for counts, _ in arrived])
        recent = {name: value - self._logged.get(name, 0) for name, value in counts.items()}
        line = f"{method.name}: {method.describe(recent, now - self._logged_at)}"
        pages = "" if self.engine.num_host_pages is None else f", host pages in use {self.pages_in_use:,}"
        logger.info("%s%s.", line, pages)
        self._logged, self._logged_at = counts, now

    def _total(self, counts: list[dict[str, int]]) -> dict[str, int]:
        total: dict[str, int] = {}
        for group, found in zip(self.groups.values(), counts):
            for name, value in group.count(found).items():
                total[name] = total.get(name, 0) + value
        return {name: value - self._before_serving.get(name, 0) for name, value in total.items()}

    def memory(self) -> dict[str, int]:
        """Bytes that the layers of this rank take."""
        found = [group.memory() for group in self.groups.values()]
        return {name: sum(memory[name] for memory in found) for name in found[0]} if found else {}

    def counts(self) -> dict[str, int]:
        """Counts since start-up, after waiting for the device."""
        return self._total([group.counters.wait() for group in self.groups.values()])

    def latest(self) -> dict[str, int]:
        """Counts by now as far as the device has come, from a thread of its own."""
        return self._total([group.counters.glance() for group in self.groups.values()])

    def begin_serving(self) -> None:
        """Forget what vLLM's warm-up requests counted."""
        self._before_serving = {}
        self._before_serving = self.counts()
        self._logged, self._logged_at, self.is_serving = {}, time.monotonic(), True

    def release(self) -> None:
        """End the thread and take the present values out of `/metrics`."""
        if self._publisher is not None:
            self._publisher.stop()
            self._publisher = None


class Publisher(threading.Thread):
    """Writes a rank's counts once a second while they change, so that the last step's are there when nothing runs.

    Neither a step nor a scrape waits for it, and it waits for no step.
    """

    def __init__(self, report: Report, writer: Writer) -> None:
        super().__init__(name="vllm-lrqk-metrics", daemon=True)
        self._report, self._writer = weakref.ref(report), writer
        self._is_over = threading.Event()

    @classmethod
    def begin(cls, report: Report) -> "Publisher | None":
        vllm_config = report._vllm_config()
        series = None if vllm_config is None else Series.of(vllm_config)
        if series is None:
            return None
        publisher = cls(report, series.writer(f"rank{report._rank}"))
        publisher.start()
        return publisher

    def run(self) -> None:
        before: dict[str, int] = {}
        while not self._is_over.wait(PUBLISH_SECONDS):
            report = self._report()
            if report is None:
                return
            now = report.latest()
            if now != before:
                self._writer.counters(now)
                before = now
            del report

    def stop(self) -> None:
        self._is_over.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(5)
        self._writer.close()


def report_of(vllm_config: Any) -> Report:
    """The report of this process's rank of an engine."""
    settings = vllm_config.additional_config
    if getattr(settings, "report", None) is None:
        settings.report = Report(vllm_config)
    return settings.report
