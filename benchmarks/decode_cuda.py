"""Decode steps of one layer on a CUDA device, part by part, beside what dense attention takes.

    python benchmarks/decode_cuda.py --json decode.json --plot decode.png
    python benchmarks/decode_cuda.py --dry-run          what would run, and its memory; needs no GPU

Times are medians, caches flushed before each; a row is reported only where the step's output agrees with the plain
torch form on the same rows. Needs torch, triton and the compiled kernels, but no vLLM (matplotlib for --plot).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cuda_workload import Shape  # noqa: E402

from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

GIB = 1 << 30
COLUMNS = {
    "length": "length",
    "batch": "batch",
    "select_ms": "score + select",
    "select_bandwidth_share": "of copy bandwidth",
    "attend_ms": "attend",
    "step_ms": "step",
    "graph_ms": "step in a graph",
    "dense_ms": "dense on GPU",
    "flash_ms": "dense, flash",
    "offload_ms": "plain offload",
    "torch_ms": "step in torch",
    "error": "error",
    "dense_error": "error against dense",
    "device_share": "GPU bytes / dense",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [8 << 10, 32 << 10, 128 << 10, 512 << 10, 1 << 20]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="tokens of each request")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--page-size", type=int, default=256)
    parser.add_argument("--factor-dtype", choices=("int8", "bfloat16"), default="int8")
    parser.add_argument("--residual", choices=("linear", "mean", "none"), default=LRQKSettings.residual)
    parser.add_argument("--miss-rates", type=float, nargs="+", default=[0.0, 0.05, 0.2, 0.5, 1.0])
    parser.add_argument("--step-miss-rate", type=float, default=0.05, help="of the whole step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--host-gib", type=float, default=48.0, help="leave out what needs more pinned memory")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="image of step times over lengths")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parsed = parser.parse_args(arguments)
    if parsed.heads % parsed.kv_heads:
        parser.error(f"--heads is {parsed.heads}, but must be a multiple of --kv-heads ({parsed.kv_heads})")
    if min(parsed.lengths) < 1 or min(parsed.batches) < 1 or parsed.repeats < 1:
        parser.error("--lengths, --batches and --repeats must be positive")
    if any(not 0 <= rate <= 1 for rate in [*parsed.miss_rates, parsed.step_miss_rate]):
        parser.error("miss rates must lie between 0 and 1")
    return parsed


def config_of(arguments: argparse.Namespace) -> LRQKSettings:
    names = ("rank", "top_k", "page_size", "factor_dtype", "residual")
    return LRQKSettings(**{name: getattr(arguments, name) for name in names})


def shapes_of(arguments: argparse.Namespace) -> list[Shape]:
    """All lengths and batches, shortest first."""
    heads = (arguments.heads, arguments.kv_heads, arguments.head_size, getattr(torch, arguments.dtype))
    return [Shape(length, batch, *heads) for length in sorted(arguments.lengths) for batch in sorted(arguments.batches)]


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What each shape takes, and why it is left out if it is."""
    config, rows = config_of(arguments), []
    for shape in shapes_of(arguments):
        host = shape.host_bytes(config) / GIB
        row = {"length": shape.length, "batch": shape.batch, "host_gib": host}
        row |= {"device_gib": shape.device_bytes(config) / GIB, "factor_gib": shape.factor_bytes(config) / GIB}
        row["left_out"] = f"more than --host-gib {arguments.host_gib:g}" if host > arguments.host_gib else ""
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table; what was not measured is a dash."""

    def cell(value: Any) -> str:
        if value is None or value == "":
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[cell(row.get(key)) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns.values()), *body]) for i in range(len(columns))]
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths)) for line in [columns.values(), *body]]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Step times over lengths, one panel per batch."""
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in rows})
    _, axes = plt.subplots(1, len(batches), figsize=(4 * len(batches), 4), sharey=True, squeeze=False)
    for axis, batch in zip(axes[0], batches):
        of_batch = [row for row in rows if row["batch"] == batch]
        for key in ("step_ms", "dense_ms", "flash_ms", "offload_ms", "torch_ms"):
            points = [(row["length"], row[key]) for row in of_batch if row.get(key) is not None]
            if points:
                axis.loglog(*zip(*points), marker="o", label=COLUMNS[key])
        axis.set(title=f"batch {batch}", xlabel="tokens", ylabel="ms")
        axis.legend()
    plt.savefig(path, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    planned = plan(options)
    if options.dry_run:
        names = {"host_gib": "host GiB", "device_gib": "GPU GiB", "factor_gib": "factors GiB", "left_out": "left out"}
        print(table(planned, {"length": "length", "batch": "batch"} | names))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device; --dry-run shows what would run", file=sys.stderr)
        return 1
    from cuda_measure import Bench

    bench = Bench(config_of(options), options.repeats, options.miss_rates, options.step_miss_rate)
    card = bench.card()
    print(json.dumps(card, indent=2), flush=True)
    rows, failed = [], False
    for shape, entry in zip(shapes_of(options), planned):
        if entry["left_out"]:
            print(f"length {shape.length}, batch {shape.batch} left out: {entry['left_out']}", flush=True)
            continue
        row = bench.measure(shape)
        failed |= not row["is_right"]
        rows.append(row)
        print(table([row], COLUMNS), flush=True)
    print(table(rows, COLUMNS))
    for name in ("resolve_ms", "fetch_ms", "fetch_bandwidth_share"):
        columns = {"length": "length", "batch": "batch"} | {
            f"{name} {rate:g}": f"{rate:.0%}" for rate in options.miss_rates
        }
        print(f"\n{name} at miss rates\n{table(rows, columns)}")
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"card": card, "settings": settings, "rows": rows}, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)
    if failed:
        print("outputs disagree with the torch form: their times mean nothing", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
