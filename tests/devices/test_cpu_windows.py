"""The compiled kernels of sliding windows against their plain torch forms."""

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, relative_error

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.window_attention import window_attention, window_decode
from vllm_lrqk.devices import cpu

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# Half a unit in the last place of the output's dtype; float32 sums of up to 1,000 products in another order.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PAGE = 16


def make_request(length: int, gone: int, kv_heads: int, head_size: int, dtype: torch.dtype, seed: int):
    """Rows in shuffled pages, NaN where nobody wrote and in page 0, which stands for the first `gone` pages; pages."""
    generator = torch.Generator().manual_seed(seed)
    count = -(-length // PAGE)
    rows = torch.full((count + 2, kv_heads, PAGE, 2, head_size), torch.nan, dtype=dtype)
    pages = torch.randperm(count, generator=generator) + 1
    for i in range(gone * PAGE, length):
        rows[pages[i // PAGE], :, i % PAGE] = torch.randn(kv_heads, 2, head_size, generator=generator).to(dtype)
    pages[:gone] = 0
    return rows, pages.int()


def run_prefill(
    name: str, tokens: int, context: int, window: int, dtype=torch.float32, head_size=64, group=4, logits=PLAIN
):
    length, kv_heads = tokens + context, 2
    gone = max(0, context - window + 1) // PAGE
    rows, pages = make_request(length, gone, kv_heads, head_size, dtype, tokens)
    at = torch.arange(context, length)
    own = rows[pages[at // PAGE].long(), :, at % PAGE]  # [T, KV, 2, d]
    query = torch.randn(tokens, kv_heads * group, head_size).to(dtype)
    output, scale = torch.full_like(query, torch.nan), head_size**-0.5
    places = pages, context, window, scale
    cpu.window_prefill(
        cpu.instruction_sets_from(name), query, own[:, :, 0], own[:, :, 1], rows, *places, output, logits
    )
    expected = torch.empty(query.shape)
    window_attention(query.float(), rows.float(), *places, expected, logits)
    assert relative_error(output, expected) < ROUNDING[dtype]


def run_decode(name: str, lengths: list[int], window: int, dtype=torch.float32, head_size=64, group=4, logits=PLAIN):
    kv_heads, found = 2, []
    for seed, length in enumerate(lengths):
        found.append(make_request(length, max(0, length - window) // PAGE, kv_heads, head_size, dtype, seed))
    table, start = torch.zeros(len(lengths), 1 + max(len(pages) for _, pages in found), dtype=torch.int32), 0
    for row, (rows, pages) in enumerate(found):
        table[row, : len(pages)] = torch.where(pages > 0, pages + start, 0)
        start += len(rows)
    rows, lens = torch.cat([rows for rows, _ in found]), torch.tensor(lengths).int()
    query = torch.randn(len(lengths), kv_heads * group, head_size).to(dtype)
    output, rest = torch.full_like(query, torch.nan), (window, head_size**-0.5)
    cpu.window_decode(cpu.instruction_sets_from(name), query, rows, table, lens, *rest, output, logits)
    expected = torch.empty(query.shape)
    window_decode(query.float(), rows.float(), table, lens, *rest, expected, logits)
    assert relative_error(output, expected) < ROUNDING[dtype]
    alone = torch.empty_like(query[-1:])
    cpu.window_decode(cpu.instruction_sets_from(name), query[-1:], rows, table[-1:], lens[-1:], *rest, alone, logits)
    assert torch.equal(alone, output[-1:])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestWindows:
    @pytest.mark.parametrize("window", [1, 17, 120, 128, 300, 5000])
    @pytest.mark.parametrize(("tokens", "context"), [(1, 0), (2, 40), (48, 0), (121, 130), (500, 0), (130, 1000)])
    def test_chunks(self, name: str, tokens: int, context: int, window: int) -> None:
        run_prefill(name, tokens, context, window)

    @pytest.mark.parametrize("window", [1, 17, 127, 128, 129, 600])
    def test_single_tokens(self, name: str, window: int) -> None:
        run_decode(name, [1, 16, 17, 128, 0, 129, 700], window)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("head_size", "group"), [(32, 1), (64, 8), (80, 3), (256, 4)])
    def test_shapes(self, name: str, dtype: torch.dtype, head_size: int, group: int) -> None:
        run_prefill(name, 130, 200, 90, dtype, head_size, group)
        run_decode(name, [5, 300], 140, dtype, head_size, group)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("cap", [0.0, 2.0, 50.0])
    @pytest.mark.parametrize("with_sinks", [False, True])
    def test_caps_and_sinks(self, name: str, dtype: torch.dtype, cap: float, with_sinks: bool) -> None:
        logits = Logits(cap, torch.linspace(-3, 6, 8) if with_sinks else None)
        run_prefill(name, 130, 200, 90, dtype, logits=logits)
        run_decode(name, [5, 0, 300], 140, dtype, logits=logits)
