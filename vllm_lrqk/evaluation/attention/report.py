"""Results as tables, JSON and plots."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_lrqk.evaluation.attention.measures import Result
from vllm_lrqk.evaluation.attention.methods import METHODS

BLOCKS = 10
"""Parts of a long run whose errors are shown one by one."""
LONG_RUN = 200
"""Steps from which on a run counts as long."""


def block_errors(result: Result) -> list[float]:
    """Mean error of each tenth of the steps."""
    errors = result.error_by_step
    ends = [round(i * len(errors) / BLOCKS) for i in range(BLOCKS + 1)]
    return [sum(errors[a:b]) / (b - a) for a, b in pairwise(ends)]


def print_tables(console: Console, results: list[Result], methods: Sequence[str], budgets: Sequence[float]) -> None:
    """One table per source; for long runs a second one of the error over the steps."""
    found = {(r.source, r.method, r.budget): r for r in results}
    for source in dict.fromkeys(result.source for result in results):
        table = Table(title=f"{source}: error of the attention output at equal device bytes")
        for name in ("budget", "method", "KiB", "rank", "top_k", "rows", "error", "worst head"):
            table.add_column(name, justify="left" if name == "method" else "right")
        for name in ("recall", "mass", "miss rate"):
            table.add_column(name, justify="right")
        for budget in budgets:
            for method in methods:
                result = found.get((source, method, budget))
                cells = _cells(result) if result else ["does not fit", *[""] * 8]
                table.add_row(f"{budget:.0%}", method, *cells)
            table.add_section()
        console.print(table)
        long = [r for r in results if r.source == source and len(r.error_by_step) >= LONG_RUN]
        if long:
            console.print(_long_table(source, long))


def _cells(result: Result) -> list[str]:
    rank = "" if result.rank is None else f"{result.rank:.0f}"
    return [
        f"{result.device_bytes / 1024:,.0f}",
        rank,
        f"{result.top_k:,.0f}",
        f"{result.rows:,.0f}",
        f"{result.error:.4f}",
        f"{result.worst_head:.3f}",
        f"{result.recall:.3f}",
        f"{result.mass:.3f}",
        f"{result.miss_rate:.3f}",
    ]


def _long_table(source: str, results: list[Result]) -> Table:
    steps = len(results[0].error_by_step)
    table = Table(title=f"{source}: error of each tenth of {steps:,} steps")
    table.add_column("budget", justify="right")
    table.add_column("method")
    for block in range(BLOCKS):
        table.add_column(f"-{round((block + 1) * steps / BLOCKS):,}", justify="right")
    for result in results:
        table.add_row(f"{result.budget:.0%}", result.method, *(f"{error:.3f}" for error in block_errors(result)))
    return table


def write_json(path: Path, results: list[Result], settings: dict[str, Any]) -> None:
    """Settings of the run and all results."""
    path.write_text(json.dumps({"settings": settings, "results": [asdict(r) for r in results]}, indent=2) + "\n")


def plot(folder: Path, results: list[Result]) -> list[Path]:
    """Error over bytes and, for long runs, over steps; the files written, none without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is missing (pip install vllm-lrqk[eval])", file=sys.stderr)
        return []
    paths = [folder / "error_over_bytes.png"]
    sources = list(dict.fromkeys(result.source for result in results))
    figure, axes = pyplot.subplots(1, len(sources), figsize=(7 * len(sources), 4.5), squeeze=False)
    for axis, source in zip(axes[0], sources):
        for method in METHODS:
            points = sorted((r.device_bytes / r.dense_bytes, r.error) for r in results if _is(r, source, method))
            if points:
                axis.semilogy(*zip(*points), _style(method), label=method)
        axis.set(title=source, xlabel="device bytes / bytes of all keys and values", ylabel="error of the output")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, paths[0])
    if len(results[0].error_by_step) < LONG_RUN:
        return paths
    paths.append(folder / "error_over_steps.png")
    figure, axes = pyplot.subplots(1, len(sources), figsize=(7 * len(sources), 4.5), squeeze=False)
    for axis, source in zip(axes[0], sources):
        for result in results:
            if result.source == source:
                steps = [(i + 0.5) * len(result.error_by_step) / BLOCKS for i in range(BLOCKS)]
                label = f"{result.method}, {result.budget:.0%}"
                axis.semilogy(steps, block_errors(result), _style(result.method), label=label)
        axis.set(title=source, xlabel="decode step", ylabel="error of the output, mean of a tenth of the steps")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, paths[1])
    return paths


def _is(result: Result, source: str, method: str) -> bool:
    return result.source == source and result.method == method


def _style(method: str) -> str:
    """Solid for this package, dashed for others, dotted for bounds."""
    return "o:" if method in ("oracle", "random") else "o-" if method in ("lrqk", "lrqk-none", "key-pca") else "s--"


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
