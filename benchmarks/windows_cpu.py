"""Layers with a sliding window: this package's kernels against vLLM's CPU_ATTN, appending included.

python benchmarks/windows_cpu.py [--threads 2]

Rows are in blocks as small as the package plans them here and of 128 tokens there, of as many layers as the model has
windows, so that a layer's rows are as cold as they are when a model is served. Both are timed in turn; medians of the
ratio of neighbours.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_lrqk.devices import cpu

SHAPES = {
    "Gemma 3 270M": (4, 1, 256, 512, 16, 15),
    "Gemma 3 27B": (32, 16, 128, 1024, 32, 16),
    "gpt-oss-20b": (64, 8, 64, 128, 16, 12),
}
"""Query heads, KV heads, head size, window, tokens of a block as `core/windows.py` plans them, layers."""
LENGTH = 4096
PAGE_OF_CPU_ATTN = 128


def one_layer(shape: tuple, batch: int, tokens: int, dtype: torch.dtype, seed: int) -> tuple[Callable, Callable]:
    """Both backends' steps of one layer: `tokens` new tokens of each of `batch` requests of equal length."""
    heads, kv_heads, d, window, page_size, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    def table(page: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = torch.randperm(batch * LENGTH // page, generator=generator).view(batch, -1).int()
        at = torch.arange(LENGTH - tokens, LENGTH)
        return pages, (pages[:, at // page].long() * page + at % page).flatten()

    count, lens = batch * tokens, torch.full((batch,), LENGTH, dtype=torch.int32)
    query, key, value = normal(count, heads, d), normal(count, kv_heads, d), normal(count, kv_heads, d)
    output, expected, scale = torch.empty_like(query), torch.empty_like(query), d**-0.5
    history = normal(batch, LENGTH, kv_heads, 2, d)

    pages, slots = table(page_size)
    rows = torch.empty(batch * LENGTH // page_size, kv_heads, page_size, 2, d, dtype=dtype)
    rows[pages.flatten().long()] = history.view(-1, page_size, kv_heads, 2, d).transpose(1, 2)
    names = cpu.instruction_sets()

    def ours() -> torch.Tensor:
        cpu.append_rows(names, key, value, rows, slots)
        if tokens == 1:
            cpu.window_decode(names, query, rows, pages, lens, window, scale, output)
        for request in range(batch if tokens > 1 else 0):
            of = slice(request * tokens, (request + 1) * tokens)
            place = pages[request], LENGTH - tokens, window, scale
            cpu.window_prefill(names, query[of], key[of], value[of], rows, *place, output[of])
        return output

    their_pages, their_slots = table(PAGE_OF_CPU_ATTN)
    isa = _get_attn_isa(dtype, PAGE_OF_CPU_ATTN, d)
    cache = torch.zeros(batch * LENGTH // PAGE_OF_CPU_ATTN, kv_heads, 2 * PAGE_OF_CPU_ATTN, d, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    every = torch.arange(LENGTH)
    all_slots = (
        their_pages[:, every // PAGE_OF_CPU_ATTN].long() * PAGE_OF_CPU_ATTN + every % PAGE_OF_CPU_ATTN
    ).flatten()
    flat = history.flatten(0, 1)
    vllm_ops.cpu_attn_reshape_and_cache(flat[:, :, 0], flat[:, :, 1], key_cache, value_cache, all_slots, isa)
    starts = (torch.arange(batch + 1) * tokens).int()
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=d,
        seq_lens=lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa=isa,
        enable_kv_split=True,
    )

    def theirs() -> torch.Tensor:
        vllm_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, their_slots, isa)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=expected,
            query_start_loc=starts,
            seq_lens=lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=window,
            block_table=their_pages,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        return expected

    difference = (ours().float() - theirs().float()).abs().max().item()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    return ours, theirs


def measure(shape: tuple, batch: int, tokens: int, dtype: torch.dtype, rounds: int) -> tuple[float, float, float]:
    """Seconds per layer of both, and the median ratio of theirs to ours."""
    layers = [one_layer(shape, batch, tokens, dtype, seed) for seed in range(shape[-1])]
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for which, seconds in enumerate(times):
            start = perf_counter()
            for layer in layers:
                layer[which]()
            seconds.append((perf_counter() - start) / len(layers))
    ratio = median(theirs / ours for ours, theirs in zip(*times))
    return median(times[0]), median(times[1]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| windows of | dtype | requests | new tokens | this package, us | CPU_ATTN, us | speed |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for batch, tokens, rounds in ((1, 1, 60), (4, 1, 40), (1, 1024, 3)):
                ours, theirs, ratio = measure(shape, batch, tokens, dtype, rounds)
                kind = str(dtype).removeprefix("torch.")
                seconds = f"{ours * 1e6:,.0f} | {theirs * 1e6:,.0f}"
                print(f"| {name} | {kind} | {batch} | {tokens} | {seconds} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
