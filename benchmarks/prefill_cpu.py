"""One layer's prefill on the CPU, part by part: LRQK beside vLLM's own CPU attention, in one process and in turns.

    python benchmarks/prefill_cpu.py --lengths 4096 16384 --chunk 2048 --json prefill.json

32 query heads, 8 KV heads, head size 128, bfloat16, default settings. A prompt of random tokens goes through in
chunks, as vLLM's scheduler cuts it. "sealing" is what LRQK adds: the Gram matrices of the queries and the factors of
the pages. Errors are relative to LRQK's plain torch form of attention, on the last chunk.
"""

import argparse
import json
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_layers import HEAD_SIZE, HEADS, KV_HEADS, SCALE, CpuAttn, relative_error  # noqa: E402

from vllm_lrqk.core.host_pages import allocate_host_pages  # noqa: E402
from vllm_lrqk.core.prefill import prefill_attention  # noqa: E402
from vllm_lrqk.methods.lrqk.dispatch import host_kernels  # noqa: E402
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

DTYPE = torch.bfloat16


class Prompt:
    """A prompt's queries, keys and values, and room for both backends' caches."""

    def __init__(self, length: int, chunk: int, config: LRQKSettings) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(length, HEADS, HEAD_SIZE, generator=generator).to(DTYPE)
        self.key = torch.randn(length, KV_HEADS, HEAD_SIZE, generator=generator).to(DTYPE)
        self.value = torch.randn(length, KV_HEADS, HEAD_SIZE, generator=generator).to(DTYPE)
        self.config, n = config, config.page_size
        pages = -(-length // n)
        self.host = allocate_host_pages(pages, KV_HEADS, n, HEAD_SIZE, DTYPE)
        self.cache = torch.zeros(pages, KV_HEADS, 2 * n, HEAD_SIZE, dtype=DTYPE)
        page_format = PageFormat.from_config(config, HEAD_SIZE)
        self.factors = FactorPages(torch.zeros(pages, KV_HEADS, page_format.page_bytes, dtype=torch.uint8), page_format)
        self.table = torch.arange(pages, dtype=torch.int32)
        self.slot_mapping = torch.arange(length)
        self.chunks = list(pairwise([*range(0, length, chunk), length]))
        self.kernels = host_kernels()
        self.output = torch.empty(chunk, HEADS, HEAD_SIZE, dtype=DTYPE)

    def lrqk(self, spent: dict[str, float]) -> torch.Tensor:
        """Output of the last chunk; adds each part's seconds to `spent`."""
        for start, end in self.chunks:
            tokens, output = slice(start, end), self.output[: end - start]
            query, key, value = self.query[tokens], self.key[tokens], self.value[tokens]
            with _Timer(spent, "append"):
                self.kernels.append_rows(key, value, self.host, self.slot_mapping[tokens])
            with _Timer(spent, "attention"):
                self.kernels.prefill_attention(query, key, value, self.host, self.table, start, SCALE, output)
            with _Timer(spent, "sealing"):
                n = self.config.page_size
                pages = range(start // n, end // n)
                if pages:
                    sealed = self.table[pages.start : pages.stop].long()
                    self.kernels.seal_pages(sealed, self.host, self.factors, self.config)
        return output.clone()

    def cpu_attn(self, spent: dict[str, float]) -> torch.Tensor:
        """The same with vLLM's own kernels."""
        key_cache, value_cache = self.cache.chunk(2, dim=2)
        isa = _get_attn_isa(DTYPE, self.config.page_size, HEAD_SIZE)
        for start, end in self.chunks:
            tokens, output = slice(start, end), self.output[: end - start]
            attention = CpuAttn([end - start], torch.tensor([end], dtype=torch.int32), DTYPE, KV_HEADS, HEADS)
            with _Timer(spent, "append"):
                vllm_ops.cpu_attn_reshape_and_cache(
                    self.key[tokens], self.value[tokens], key_cache, value_cache, self.slot_mapping[tokens], isa
                )
            with _Timer(spent, "attention"):
                attention(self.query[tokens], self.cache, self.table[None], output)
        return output.clone()

    def exact(self) -> torch.Tensor:
        start, end = self.chunks[-1]
        output = torch.empty(end - start, HEADS, HEAD_SIZE)
        tokens = slice(start, end)
        prefill_attention(
            self.query[tokens].float(), self.key[tokens].float(), self.value[tokens].float(), self.host.float(),
            self.table, start, SCALE, output,
        )  # fmt: skip
        return output


class _Timer:
    def __init__(self, spent: dict[str, float], part: str) -> None:
        self.spent, self.part = spent, part

    def __enter__(self) -> None:
        self.start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.spent[self.part] += perf_counter() - self.start


def measure(length: int, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Records of one length: median seconds of each part."""
    prompt = Prompt(length, arguments.chunk, LRQKSettings())
    runs: dict[str, list[dict[str, float]]] = {"lrqk": [], "cpu_attn": []}
    prompt.lrqk(defaultdict(float))
    exact = prompt.exact()
    errors = {}
    for _ in range(arguments.repeats):
        for backend, call in (("lrqk", prompt.lrqk), ("cpu_attn", prompt.cpu_attn)):
            spent: dict[str, float] = defaultdict(float)
            errors[backend] = relative_error(call(spent), exact)
            runs[backend].append(spent)
    records = []
    for backend, spents in runs.items():
        seconds = {part: median(spent[part] for spent in spents) for part in spents[0]}
        total = sum(seconds.values())
        common = {"length": length, "batch": 1, "threads": arguments.threads, "backend": backend}
        shares = {f"{part}_share": part_seconds / total for part, part_seconds in seconds.items()}
        records.append({**common, "tokens_per_s": length / total, "relative_error": errors[backend], **shares})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="TOKENS")
    parser.add_argument("--chunk", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table("tokens", "lrqk tokens/s", "sealing", "append", "error", "cpu_attn tokens/s", "error", "ratio")
    table.title = f"{host_kernels().name}, {arguments.threads} threads, chunks of {arguments.chunk:,}"
    records: list[dict] = []
    for length in tqdm(arguments.lengths, desc="lengths"):
        ours, theirs = measure(length, arguments)
        records += [ours, theirs]
        table.add_row(
            f"{length:,}",
            f"{ours['tokens_per_s']:,.0f}",
            f"{ours['sealing_share']:.1%}",
            f"{ours['append_share']:.1%}",
            f"{ours['relative_error']:.2g}",
            f"{theirs['tokens_per_s']:,.0f}",
            f"{theirs['relative_error']:.2g}",
            f"{ours['tokens_per_s'] / theirs['tokens_per_s']:.2f}",
        )
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
