"""One layer's decode step on the CPU: LRQK beside vLLM's own CPU attention, in one process and in turns.

    python benchmarks/decode_cpu.py --lengths 1024 4096 32768 131072 --batch 1 8 --json decode.json --plot decode.png

32 query heads, 8 KV heads, head size 128, bfloat16, default settings. Every call reads another copy of the layer
until 128 MiB have passed, so that nothing stays in the caches that would not stay there in a model. Times are medians.
Errors are relative to attention in float32. The floor is the bytes that a step has to read over the memory bandwidth
that this process measures. "select" is the selection alone (scores, top-k, residual sums), which a decode step
contains; its floor is the factor pages. In vLLM's tensor a block holds the factor pages of all layers; with
`--layers-apart 32` a step whose factor pages lie so is measured beside one whose pages lie side by side.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_layers import (  # noqa: E402
    HEAD_SIZE,
    HEADS,
    KV_HEADS,
    SCALE,
    CpuAttn,
    exact_attention,
    make_layer,
    read_bandwidth,
    relative_error,
)

from vllm_lrqk.core.config import ConfigError  # noqa: E402
from vllm_lrqk.methods.lrqk.dispatch import host_kernels  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

DTYPE = torch.bfloat16
COLD_BYTES = 128 << 20
MAX_TOKENS = 1 << 19
SECONDS = 2.0
"""Measured time per case, at least; and at least 15 calls."""


def kernel_test_passes() -> bool:
    """A fast part of the test of the kernels that are measured here."""
    test = ROOT / "tests/methods/lrqk/test_cpu_decode.py"
    command = [sys.executable, "-m", "pytest", "-q", str(test), "-k", "ragged_batch or selects_by_peaks or threads"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def step_bytes(length: int, batch: int, rows: int, page_bytes: int, config: LRQKSettings) -> dict[str, int]:
    """Bytes that one step reads at least."""
    row_bytes = 2 * HEAD_SIZE * DTYPE.itemsize
    candidates = min(length // config.page_size * config.page_size, length - config.recent_tokens) - config.sink_tokens
    pages = batch * KV_HEADS * -(-candidates // config.page_size) if candidates > config.top_k else 0
    factor_bytes = pages * page_bytes
    dense_bytes = batch * length * KV_HEADS * row_bytes
    return {"lrqk": rows * row_bytes + factor_bytes, "cpu_attn": dense_bytes, "select": factor_bytes}


def measure(
    length: int, batch: int, config: LRQKSettings, layers_apart: int | None
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Median milliseconds of both backends and of LRQK's selection alone, their relative errors and bytes."""
    kernels = host_kernels()
    layer = make_layer(length, batch, config, DTYPE, kernels)
    copies = -(-COLD_BYTES // layer.cpu_attn_cache.nbytes)
    layers = [layer] + [layer.clone() for _ in range(copies - 1)]
    cpu_attn = CpuAttn([1] * batch, layer.seq_lens, DTYPE, KV_HEADS, HEADS)
    outputs = {name: torch.empty_like(layer.query) for name in ("lrqk", "cpu_attn")}
    attended = torch.zeros(batch, dtype=torch.int64)
    apart = {id(now): now.apart(layers_apart) for now in layers} if layers_apart else {}

    def lrqk(now) -> None:  # type: ignore[no-untyped-def]
        attended.copy_(
            kernels.decode_attention(
                now.query, now.host, now.factors, now.block_table, now.seq_lens, SCALE, config, outputs["lrqk"]
            )
        )

    def dense(now) -> None:  # type: ignore[no-untyped-def]
        cpu_attn(now.query, now.cpu_attn_cache, now.block_table, outputs["cpu_attn"])

    def select(now) -> None:  # type: ignore[no-untyped-def]
        kernels.select(now.query, now.factors, now.block_table, now.seq_lens, SCALE, config)

    calls_by_name = {"lrqk": lrqk, "cpu_attn": dense, "select": select}
    if layers_apart:
        calls_by_name["apart"] = lambda now: lrqk(apart[id(now)])
    times: dict[str, list[float]] = {name: [] for name in calls_by_name}
    calls, spent = 0, 0.0
    while calls < 15 + copies or spent < SECONDS:
        now = layers[calls % copies]
        for name, call in calls_by_name.items():
            start = perf_counter()
            call(now)
            taken = perf_counter() - start
            spent += taken
            if calls >= min(copies, 5):
                times[name].append(taken)
        calls += 1
    exact = exact_attention(layer)
    errors = {name: relative_error(output, exact) for name, output in outputs.items()}
    needed = step_bytes(length, batch, int(attended.sum()), layer.factors.format.page_bytes, config)
    return {name: median(values) * 1e3 for name, values in times.items()}, errors, needed


def save_plot(records: list[dict], path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: matplotlib is missing (pip install vllm-lrqk[eval])", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for batch in sorted({record["batch"] for record in records}):
        for backend, style in (("lrqk", "o-"), ("cpu_attn", "s--")):
            chosen = [r for r in records if r["batch"] == batch and r["backend"] == backend]
            axes.loglog(
                [r["length"] for r in chosen],
                [r["median_ms"] for r in chosen],
                style,
                label=f"{backend}, batch {batch}",
            )
    axes.set(xlabel="tokens per request", ylabel="milliseconds per layer and step", title="Decode attention on the CPU")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [1 << power for power in range(10, 19)]
    parser.add_argument("--lengths", type=int, nargs="+", default=default, metavar="TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="REQUESTS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers-apart", type=int, metavar="LAYERS", help="measure factor pages as vLLM lays them too")
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help='settings: {"rank": 32}')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    try:
        config = LRQKSettings.from_dict(arguments.config)
    except ConfigError as error:
        parser.error(str(error))
    cases = [
        (length, batch) for batch in arguments.batch for length in arguments.lengths if length * batch <= MAX_TOKENS
    ]
    is_green = kernel_test_passes()
    bandwidth = read_bandwidth()
    name = host_kernels().name
    title = f"{name}, {arguments.threads} threads, {bandwidth / 1e9:.1f} GB/s read"
    headings = ("lrqk ms", "floor ms", "error", "select ms", "floor ms", "cpu_attn ms", "floor ms", "error", "speed-up")
    apart = [f"lrqk ms, {arguments.layers_apart} layers apart"] if arguments.layers_apart else []
    table = Table("tokens", "batch", *headings, *apart, title=title)
    records: list[dict] = []
    for length, batch in tqdm(cases, desc="cases"):
        times, errors, needed = measure(length, batch, config, arguments.layers_apart)
        floors = {backend: size / bandwidth * 1e3 for backend, size in needed.items()}
        speed_up = f"{times['cpu_attn'] / times['lrqk']:.2f}" if is_green else "-"
        numbers = [times["lrqk"], floors["lrqk"], errors["lrqk"], times["select"], floors["select"]]
        numbers += [times["cpu_attn"], floors["cpu_attn"], errors["cpu_attn"]]
        shown = [f"{times['apart']:.3g}"] if apart else []
        table.add_row(f"{length:,}", str(batch), *(f"{number:.3g}" for number in numbers), speed_up, *shown)
        for backend in errors:
            records.append(
                {
                    "length": length,
                    "batch": batch,
                    "threads": arguments.threads,
                    "backend": backend,
                    "median_ms": times[backend],
                    "floor_ms": floors[backend],
                    "relative_error": errors[backend],
                }
                | (
                    {f"{name}_ms": times[name] for name in ("select", "apart") if name in times}
                    if backend == "lrqk"
                    else {}
                )
            )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    if arguments.plot:
        save_plot(records, arguments.plot)
    if not is_green:
        sys.exit("The kernel test is red: no speed-up is reported. Run pytest tests/methods/lrqk/test_cpu_decode.py.")


if __name__ == "__main__":
    main()
