"""One layer under LoLA on the CPU, decode steps and prefill, beside vLLM's own CPU attention.

    python benchmarks/lola_cpu.py --lengths 4096 16384 65536 131072 --json lola.json

32 query heads, 8 KV heads, head size 128, bfloat16, default settings. Both backends run in one process and in turns;
ratios are of neighbouring calls, for decode steps of one dense step and the median of eight of LoLA's. Decode steps
take a request of the given length, one copy of the layer after the other until 128 MiB have passed, so that nothing
stays in the caches that would not stay there in a model; "update" is a step in which a chunk leaves the window, one of
64. "steps" are LoLA's decode steps alone, all lengths in turns: whether their time depends on the length.
Prefill goes through in chunks, as vLLM's scheduler cuts it; above --whole tokens the dense backend runs its first and
its last chunk alone, and its time is that of chunks that grow linearly in between. Times are medians with their range.
Errors are relative to exact attention in float32: LoLA's is what the method loses on keys and values of these
statistics, not rounding; rounding is measured against the plain torch form in tests/methods/lola/test_cpu.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
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

from cpu_layers import HEAD_SIZE, HEADS, KV_HEADS, SCALE, CpuAttn, TokenWriter, relative_error  # noqa: E402

from vllm_lrqk.core.config import ConfigError  # noqa: E402
from vllm_lrqk.core.layer import LayerPlace, LayerShape  # noqa: E402
from vllm_lrqk.core.prefill import prefill_attention  # noqa: E402
from vllm_lrqk.methods.lola.layer import LolaLayer, memory  # noqa: E402
from vllm_lrqk.methods.lola.settings import LolaSettings  # noqa: E402

DTYPE = torch.bfloat16
PAGE_SIZE = 256
COLD_BYTES = 128 << 20
KINDS = ("steps", "decode", "prefill")
BURST = 8
"""Decode steps of LoLA for each of the dense backend, which takes a hundred times as long at 128K."""
BLOCK = torch.zeros(1, dtype=torch.int32)


class Prompt:
    """A request's tokens, [T, H or KV, d], and its first pages in vLLM's own cache."""

    def __init__(self, length: int) -> None:
        writer, self.length = TokenWriter(torch.Generator().manual_seed(0)), length
        pages = -(-length // PAGE_SIZE)
        rows = torch.empty(pages, KV_HEADS, PAGE_SIZE, 2, HEAD_SIZE, dtype=DTYPE)
        queries = []
        for page in range(pages):
            writer.write(rows[page], is_first=page == 0)
            queries.append(writer.queries(PAGE_SIZE).flatten(1, 2).to(DTYPE))
        self.query = torch.cat(queries)[:length]
        tokens = rows.transpose(1, 2).flatten(0, 1)[:length]  # [T, KV, 2, d]
        self.key, self.value = tokens[:, :, 0].contiguous(), tokens[:, :, 1].contiguous()
        self.cache = torch.zeros(pages, KV_HEADS, 2 * PAGE_SIZE, HEAD_SIZE, dtype=DTYPE)
        self.table = torch.arange(pages, dtype=torch.int32)
        self.append_dense(0, length)

    def append_dense(self, start: int, end: int) -> None:
        key_cache, value_cache = self.cache.chunk(2, dim=2)
        isa = _get_attn_isa(DTYPE, PAGE_SIZE, HEAD_SIZE)
        vllm_ops.cpu_attn_reshape_and_cache(
            self.key[start:end], self.value[start:end], key_cache, value_cache, torch.arange(start, end), isa
        )

    def exact(self, start: int, end: int) -> torch.Tensor:
        """float32 [end - start, H, d], without rounding of the outputs."""
        output = torch.empty(end - start, HEADS, HEAD_SIZE)
        pages = -(-max(start, 1) // PAGE_SIZE)
        host = torch.zeros(pages * PAGE_SIZE, KV_HEADS, 2, HEAD_SIZE)
        host[:start] = torch.stack([self.key[:start], self.value[:start]], 2).float()
        host = host.unflatten(0, (pages, PAGE_SIZE)).transpose(1, 2).contiguous()
        part = [x[start:end].float() for x in (self.query, self.key, self.value)]
        prefill_attention(*part, host, torch.arange(pages), start, SCALE, output)
        return output


def make_layer(settings: LolaSettings) -> LolaLayer:
    size = memory(settings, HEAD_SIZE, DTYPE)
    raw = torch.zeros(1, KV_HEADS, size, dtype=torch.uint8)
    return LolaLayer(raw, LayerShape(HEADS, KV_HEADS, HEAD_SIZE, "bfloat16", SCALE), settings, LayerPlace())


def run_chunk(layer: LolaLayer, prompt: Prompt, start: int, end: int, output: torch.Tensor) -> None:
    part = prompt.query[start:end], prompt.key[start:end], prompt.value[start:end]
    layer.kernels.prefill_attention(*part, layer.memory, 0, start, layer.rules, output)


def in_turns(
    calls: dict[str, Callable[[int], None]], bursts: dict[str, int], seconds: float, least: int
) -> dict[str, list[float]]:
    """Milliseconds of each call, `bursts` calls of it at a time; the argument counts its calls.

    The first two rounds do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = dict.fromkeys(calls, 0)
    spent, rounds = 0.0, 0
    while rounds < least + 2 or spent < seconds:
        for name, call in calls.items():
            for _ in range(bursts.get(name, 1)):
                start = perf_counter()
                call(counts[name])
                taken = perf_counter() - start
                counts[name] += 1
                spent += taken
                if rounds >= 2:
                    times[name].append(taken * 1e3)
        rounds += 1
    return times


def filled_layers(prompt: Prompt, settings: LolaSettings, last: int) -> list[LolaLayer]:
    """Layers that have taken in the first `last` tokens, as many as are read before the first is read again."""
    first = make_layer(settings)
    scratch = torch.empty(4096, HEADS, HEAD_SIZE, dtype=DTYPE)
    for start in range(0, last, 4096):
        end = min(start + 4096, last)
        run_chunk(first, prompt, start, end, scratch[: end - start])
    layers = [make_layer(settings) for _ in range(-(-COLD_BYTES // first.memory.raw.nbytes))]
    for layer in layers:
        layer.memory.raw.copy_(first.memory.raw)
    return layers


def length_without_update(settings: LolaSettings, length: int) -> int:
    return length + (settings.updates(length) > settings.updates(length - 1))


def measure_steps(prompt: Prompt, settings: LolaSettings, lengths: list[int], seconds: float) -> dict[int, list[float]]:
    """Milliseconds of LoLA's decode steps by length."""
    calls, output = {}, torch.empty(1, HEADS, HEAD_SIZE, dtype=DTYPE)
    for length in lengths:
        token = slice(length - 1, length)
        arguments = prompt.query[token], prompt.key[token], prompt.value[token]
        layers = filled_layers(prompt, settings, length - 1)
        lens = torch.tensor([length_without_update(settings, length)], dtype=torch.int32)

        def call(round_: int, arguments=arguments, layers=layers, lens=lens) -> None:
            layer = layers[round_ % len(layers)]
            layer.kernels.decode_attention(*arguments, layer.memory, BLOCK, lens, layer.rules, output)

        calls[str(length)] = call
    times = in_turns(calls, dict.fromkeys(calls, 64), seconds, 5)
    return {length: times[str(length)] for length in lengths}


def measure_decode(prompt: Prompt, settings: LolaSettings, seconds: float) -> dict[str, object]:
    """One decode step of a request whose last token is that of the prompt."""
    length, last = prompt.length, prompt.length - 1
    layers = filled_layers(prompt, settings, last)
    copies, before = len(layers), layers[0].memory.raw.clone()
    query, key, value = (x[last:] for x in (prompt.query, prompt.key, prompt.value))
    outputs = {name: torch.empty_like(query) for name in ("lola", "cpu_attn", "update")}
    # A chunk leaves when the ring is full: with the first token after it.
    border = length + (settings.ring_rows - length) % settings.chunk + 1
    seen = {"lola": length_without_update(settings, length), "update": border}
    lens = {name: torch.tensor([n], dtype=torch.int32) for name, n in seen.items()}
    cpu_attn = CpuAttn([1], torch.tensor([length], dtype=torch.int32), DTYPE, KV_HEADS, HEADS)

    def lola(name: str, round_: int) -> None:
        layer = layers[round_ % copies]
        layer.kernels.decode_attention(query, key, value, layer.memory, BLOCK, lens[name], layer.rules, outputs[name])

    def renew(round_: int) -> None:
        """Not measured: the update changed the memory."""
        layers[round_ % copies].memory.raw.copy_(before)

    calls = {
        "lola": lambda round_: lola("lola", round_),
        "cpu_attn": lambda _: cpu_attn(query, prompt.cache, prompt.table[None], outputs["cpu_attn"]),
    }
    times = in_turns(calls, {"lola": BURST}, seconds, 15)
    exact = prompt.exact(last, length)
    errors = {name: relative_error(outputs[name], exact) for name in calls}
    calls = {"renew": renew, "update": lambda round_: lola("update", round_)}
    times |= in_turns(calls, {}, seconds / 4, 25)
    return record("decode", length, times, errors)


def measure_prefill(prompt: Prompt, settings: LolaSettings, chunk: int, whole: int, repeats: int) -> dict[str, object]:
    """A whole prompt in chunks."""
    length = prompt.length
    chunks = list(pairwise([*range(0, length, chunk), length]))
    output = torch.empty(chunk, HEADS, HEAD_SIZE, dtype=DTYPE)
    layer = make_layer(settings)

    def lola(_: int) -> None:
        for start, end in chunks:
            run_chunk(layer, prompt, start, end, output[: end - start])

    def dense_chunk(start: int, end: int) -> float:
        attention = CpuAttn([end - start], torch.tensor([end], dtype=torch.int32), DTYPE, KV_HEADS, HEADS)
        begin = perf_counter()
        prompt.append_dense(start, end)
        attention(prompt.query[start:end], prompt.cache, prompt.table[None], output[: end - start])
        return perf_counter() - begin

    times: dict[str, list[float]] = {"lola": [], "cpu_attn": []}
    errors = {}
    start, end = chunks[-1]
    exact = prompt.exact(start, end)
    for _ in range(repeats):
        begin = perf_counter()
        lola(0)
        times["lola"].append((perf_counter() - begin) * 1e3)
        errors["lola"] = relative_error(output[: end - start], exact)
        if length <= whole:
            seconds = sum(dense_chunk(*each) for each in chunks)
        else:  # chunks of equal size take times that grow linearly with what is before them
            seconds = len(chunks) * (dense_chunk(*chunks[0]) + dense_chunk(*chunks[-1])) / 2
        times["cpu_attn"].append(seconds * 1e3)
    errors["cpu_attn"] = relative_error(output[: end - start], exact)
    return record("prefill", length, times, errors)


def spread(times: list[float]) -> dict[str, object]:
    return {"median_ms": median(times), "range_ms": [min(times), max(times)]}


def record(kind: str, length: int, times: dict[str, list[float]], errors: dict[str, float]) -> dict[str, object]:
    burst = len(times["lola"]) // len(times["cpu_attn"])
    ours = [median(times["lola"][i : i + burst]) for i in range(0, len(times["lola"]), burst)]
    ratios = [dense / lola for lola, dense in zip(ours, times["cpu_attn"])]
    found: dict[str, object] = {"kind": kind, "length": length, "threads": torch.get_num_threads()}
    for name in ("lola", "update", "cpu_attn"):
        if name in times:
            found[name] = spread(times[name])
    found["ratio"] = {"median": median(ratios), "range": [min(ratios), max(ratios)]}
    return found | {"relative_error": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072], metavar="TOKENS")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--chunk", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--whole", type=int, default=16384, metavar="TOKENS", help="longest dense prefill run in full")
    parser.add_argument("--longest-prefill", type=int, default=65536, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, help="of a prefill")
    parser.add_argument("--seconds", type=float, default=4.0, help="of decode steps, per length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--config", type=json.loads, default={}, metavar="JSON", help='settings: {"window": 320}')
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        settings = LolaSettings.from_dict(arguments.config)
    except ConfigError as error:
        parser.error(str(error))
    name = make_layer(settings).kernels_name
    headings = ("lola ms", "range", "update ms", "error", "cpu_attn ms", "range", "error", "ratio", "range")
    table = Table("", "tokens", *headings, title=f"{name}, {arguments.threads} threads")
    records, steps = [], []
    if "steps" in arguments.kinds:
        prompt = Prompt(max(arguments.lengths))
        for length, times in measure_steps(prompt, settings, arguments.lengths, 2 * arguments.seconds).items():
            table.add_row("steps", f"{length:,}", f"{median(times):.3g}", f"{min(times):.3g} - {max(times):.3g}")
            steps.append({"kind": "steps", "length": length, "threads": arguments.threads, "lola": spread(times)})
    for length in tqdm(arguments.lengths, desc="lengths"):
        prompt = Prompt(length)
        if "decode" in arguments.kinds:
            records.append(measure_decode(prompt, settings, arguments.seconds))
        if "prefill" in arguments.kinds and length <= arguments.longest_prefill:
            records.append(measure_prefill(prompt, settings, arguments.chunk, arguments.whole, arguments.repeats))
    for found in records:
        ours, dense, ratio = found["lola"], found["cpu_attn"], found["ratio"]
        update = f"{found['update']['median_ms']:.3g}" if "update" in found else ""
        spans = [f"{low:.3g} - {high:.3g}" for low, high in (ours["range_ms"], dense["range_ms"], ratio["range"])]
        table.add_row(
            found["kind"],
            f"{found['length']:,}",
            f"{ours['median_ms']:.3g}",
            spans[0],
            update,
            f"{found['relative_error']['lola']:.2g}",
            f"{dense['median_ms']:.4g}",
            spans[1],
            f"{found['relative_error']['cpu_attn']:.2g}",
            f"{ratio['median']:.1f}",
            spans[2],
        )
    Console(width=140).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(steps + records, indent=1) + "\n")


if __name__ == "__main__":
    main()
