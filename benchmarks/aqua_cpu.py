"""One layer's decode step on the CPU: AQUA beside vLLM's own CPU attention, in one process and in turns.

    python benchmarks/aqua_cpu.py --lengths 32768 131072 --json aqua.json

32 query heads, 8 KV heads, head size 128, bfloat16, one request. Every call reads another copy of the layer until
128 MiB have passed, so that nothing stays in the caches that would not stay there in a model. Times are medians;
"share" is the bytes that a step reads over those of dense attention, whose inverse bounds the speed-up.
Errors are relative to attention in float32; the basis is that of the layer's own queries and keys.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_layers import HEAD_SIZE, HEADS, KV_HEADS, SCALE, CpuAttn, pack_cache, read_bandwidth  # noqa: E402

from vllm_lrqk.methods.aqua import cpu  # noqa: E402
from vllm_lrqk.methods.aqua.basis import Basis, make_basis  # noqa: E402
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks  # noqa: E402
from vllm_lrqk.methods.aqua.settings import AquaSettings  # noqa: E402

DTYPE = torch.bfloat16
BLOCK_SIZE = 128
COLD_BYTES = 128 << 20
SECONDS = 4.0
"""Measured time per length, at least; and at least 15 calls."""
CONFIGURATIONS = {
    "keep 1.0": AquaSettings(keep=1.0),
    "keep 0.75": AquaSettings(keep=0.75),
    "keep 0.5": AquaSettings(keep=0.5),
    "keep 0.75, per query head": AquaSettings(keep=0.75, choose="query_head"),
    "stored 0.75, keep 1.0": AquaSettings(keep=1.0, stored=0.75),
    "int8, keep 1.0": AquaSettings(keep=1.0, key_dtype="int8"),
    "int8, keep 0.5": AquaSettings(keep=0.5, key_dtype="int8"),
}


def kernel_test_passes() -> bool:
    """A fast part of the test of the kernels that are measured here."""
    test = ROOT / "tests" / "methods" / "aqua" / "test_cpu.py"
    command = [sys.executable, "-m", "pytest", "-q", str(test), "-k", "decode_is or append_is"]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


@dataclass
class Request:
    """One layer's tokens: query [1, H, d], key and value [L, KV, d]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def random(cls, length: int) -> "Request":
        """Coordinates that fall off in size in a basis of their own, as those of real keys do."""
        generator = torch.Generator().manual_seed(0)
        rotation = torch.linalg.qr(torch.randn(HEAD_SIZE, HEAD_SIZE, generator=generator))[0]
        spectrum = 3 * torch.arange(1, HEAD_SIZE + 1) ** -0.5

        def draw(tokens: int, heads: int) -> torch.Tensor:
            return (torch.randn(tokens, heads, HEAD_SIZE, generator=generator) * spectrum @ rotation).to(DTYPE)

        value = torch.randn(length, KV_HEADS, HEAD_SIZE, generator=generator).to(DTYPE)
        return cls(draw(1, HEADS), draw(length, KV_HEADS), value)

    def basis(self, stored: int) -> Basis:
        key = self.key.double().transpose(0, 1)
        gram = key.mT @ key / len(self.key)
        return make_basis(gram * (HEADS // KV_HEADS), gram, key.mean(1), stored)

    def exact(self) -> torch.Tensor:
        """float32 [1, H, d]"""
        query = self.query[0].float().unflatten(0, (KV_HEADS, -1)) * SCALE
        key, value = self.key.float().transpose(0, 1), self.value.float().transpose(0, 1)
        return ((query @ key.mT).softmax(-1) @ value).flatten(0, 1)[None]


def measure(length: int, clock: Callable[[], float]) -> dict[str, tuple[float, float, float]]:
    """Median milliseconds, relative error and share of the dense bytes read of every configuration and of CPU_ATTN."""
    request, kernels = Request.random(length), cpu.kernels()
    num_blocks = length // BLOCK_SIZE
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).int()[None]
    slots = (table[0].long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    lens = torch.tensor([length], dtype=torch.int32)
    output = torch.empty_like(request.query)
    calls, shares = {}, {"CPU_ATTN": 1.0}
    for name, config in CONFIGURATIONS.items():
        form = BlockFormat.from_config(config, BLOCK_SIZE, HEAD_SIZE, DTYPE)
        basis = request.basis(form.stored)
        first = Blocks(torch.zeros(num_blocks, KV_HEADS, form.block_bytes, dtype=torch.uint8), form)
        kernels.append(request.key, request.value, first, basis, slots)
        copies = -(-COLD_BYTES // first.raw.nbytes)
        layers = [first, *(Blocks(first.raw.clone(), form) for _ in range(copies - 1))]

        def aqua(turn: int, layers=layers, basis=basis, config=config) -> None:  # type: ignore[no-untyped-def]
            now = layers[turn % len(layers)]
            kernels.decode_attention(request.query, now, basis, table, lens, SCALE, config, output)

        calls[name] = aqua
        read = config.num_kept(HEAD_SIZE) * form.key_dtype.itemsize + 4 * form.is_quantized
        if config.choose == "query_head":
            read = _read_per_query_head(request, basis, config)
        shares[name] = (read + HEAD_SIZE * DTYPE.itemsize) / (2 * HEAD_SIZE * DTYPE.itemsize)
    host = torch.empty(num_blocks, KV_HEADS, BLOCK_SIZE, 2, HEAD_SIZE, dtype=DTYPE)
    rows = torch.stack([request.key, request.value], 2).unflatten(0, (num_blocks, BLOCK_SIZE)).transpose(1, 2)
    host[table[0].long()] = rows
    cache = pack_cache(host)
    caches = [cache, *(cache.clone() for _ in range(-(-COLD_BYTES // cache.nbytes) - 1))]
    cpu_attn = CpuAttn([1], lens, DTYPE, KV_HEADS, HEADS)
    calls["CPU_ATTN"] = lambda turn: cpu_attn(request.query, caches[turn % len(caches)], table, output)
    times: dict[str, list[float]] = {name: [] for name in calls}
    exact, errors = request.exact(), {}
    turn, spent = 0, 0.0
    while turn < 18 or spent < SECONDS:
        for name, call in calls.items():
            start = clock()
            call(turn)
            taken = clock() - start
            spent += taken
            if turn >= 3:
                times[name].append(taken)
            errors[name] = float((output.float() - exact).norm() / exact.norm())
        turn += 1
    return {name: (median(times[name]) * 1e3, errors[name], shares[name]) for name in calls}


def _read_per_query_head(request: Request, basis: Basis, config: AquaSettings) -> float:
    """Bytes of keys that a group reads of each token, where its heads choose for themselves."""
    from vllm_lrqk.methods.aqua.attention import chosen_dimensions

    projected = basis.project_query(request.query)
    chosen = chosen_dimensions(projected, basis.sigma, config.num_kept(HEAD_SIZE), config.choose)
    return float(chosen.unflatten(1, (KV_HEADS, -1)).any(2).float().sum(-1).mean()) * DTYPE.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768, 131072], metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processor-time", action="store_true", help="not wall time: where others use the machine too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    arguments = parser.parse_args()
    if any(length < BLOCK_SIZE or length % BLOCK_SIZE for length in arguments.lengths):
        parser.error(f"--lengths has {arguments.lengths}, but must be multiples of {BLOCK_SIZE}")
    clock = process_time if arguments.processor_time else perf_counter
    is_green = kernel_test_passes()
    torch.set_num_threads(arguments.threads)
    title = f"{cpu.kernels().name}, {arguments.threads} threads, {read_bandwidth() / 1e9:.1f} GB/s read"
    table = Table("tokens", "attention", "ms", "error", "share of bytes", "bound", "speed-up", title=title)
    records = []
    for length in tqdm(arguments.lengths, desc="lengths"):
        found = measure(length, clock)
        dense = found["CPU_ATTN"][0]
        for name, (time, error, share) in found.items():
            speed_up = f"{dense / time:.2f}" if is_green else "-"
            table.add_row(
                f"{length:,}", name, f"{time:.3g}", f"{error:.3g}", f"{share:.3f}", f"{1 / share:.2f}", speed_up
            )
            records.append(
                {"length": length, "threads": arguments.threads, "attention": name}
                | {"median_ms": time, "relative_error": error, "share_of_bytes": share}
            )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    if not is_green:
        sys.exit("The kernel test is red: no speed-up is reported. Run pytest tests/methods/aqua/test_cpu.py.")


if __name__ == "__main__":
    main()
