"""Series on vLLM's own `/metrics`: every process of an engine writes files of prometheus_client, its server reads them.

These are the files of prometheus_client's multi-process mode, which merges what several processes count. With several
API servers vLLM reads that mode's folder by itself; otherwise the process that starts the engine makes a folder and
adds a collector of it to the default registry. A scrape reads files and asks nobody.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
HELP = {
    "decode_tokens": "Decode queries answered, one per request, step and layer.",
    "pages_sealed": "Pages whose factors were computed, one per page and layer.",
    "rows_attended": "Rows attended exactly by decode steps, summed over layers and KV heads.",
    "rows_hit": "Rows that decode steps found in the hot cache.",
    "rows_missed": "Rows that decode steps fetched from host memory.",
    "bytes_fetched": "Bytes of keys and values fetched from host memory.",
    "host_pages_in_use": "Host pages that running requests hold.",
    "host_pages_free": "Host pages that new tokens can take, those of the prefix cache included.",
}


@cache
def expose() -> str | None:
    """The folder whose files this process's `/metrics` shows; None without prometheus_client."""
    shared = os.environ.get(_SHARED_FOLDER)
    if shared is not None:
        return shared
    try:
        from prometheus_client import REGISTRY
        from prometheus_client.multiprocess import MultiProcessCollector
    except ImportError:
        return None
    folder, owner = tempfile.mkdtemp(prefix="vllm-lrqk-metrics-"), os.getpid()
    MultiProcessCollector(REGISTRY, folder)
    atexit.register(_remove, folder, owner)
    return folder


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Series:
    """Where the series of one engine are written, and under which names and labels.

    Args:
        prefix: of all names.
    """

    folder: str
    prefix: str
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, vllm_config: Any) -> "Series | None":
        """Those of an engine, in one of its own processes; None where nothing is written."""
        engine = vllm_config.additional_config.engine
        if engine.metrics_folder is None or not Path(engine.metrics_folder).is_dir():  # of another host
            return None
        name = vllm_config.model_config.served_model_name
        model = name if isinstance(name, str) else (name or [vllm_config.model_config.model])[0]
        labels = ("model_name", model), ("engine", str(vllm_config.parallel_config.data_parallel_index))
        return cls(engine.metrics_folder, f"vllm:{engine.method.settings.key}_", labels)

    def writer(self, part: str) -> "Writer":
        """What writes them.

        Args:
            part: of this process, in the names of its files.
        """
        return Writer(self, f"{os.getpid()}-{part}")


class Writer:
    """Writes the series of one part of a process, each a number of its own that a scrape adds up.

    Args:
        name: that no other writer has.
    """

    def __init__(self, series: Series, name: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict, mmap_key

        self._series, self._key, self._open = series, mmap_key, MmapedDict
        self._paths = {kind: Path(series.folder, f"{kind}_{name}.db") for kind in ("counter", "gauge_livemostrecent")}
        self._files: dict[str, Any] = {}

    def counters(self, values: Mapping[str, int]) -> None:
        """Set sums since start-up."""
        for name, value in values.items():
            self._write("counter", name, f"{name}_total", value, 0.0)

    def gauges(self, values: Mapping[str, int]) -> None:
        """Set present values; of several writers the last one's is shown."""
        for name, value in values.items():
            self._write("gauge_livemostrecent", name, name, value, time.time())

    def _write(self, kind: str, metric: str, sample: str, value: int, timestamp: float) -> None:
        if kind not in self._files:
            self._files[kind] = self._open(str(self._paths[kind]))
        labels = dict(self._series.labels)
        help_text = HELP.get(metric, metric.replace("_", " ").capitalize() + ".")
        prefix = self._series.prefix
        key = self._key(prefix + metric, prefix + sample, list(labels), list(labels.values()), help_text)
        self._files[kind].write_value(key, float(value), timestamp)

    def close(self) -> None:
        """Take the present values out; what was counted stays until the server ends."""
        for kind, file in self._files.items():
            file.close()
            if kind != "counter":
                self._paths[kind].unlink(missing_ok=True)
        self._files.clear()
