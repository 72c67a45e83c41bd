"""The compiled append and prefill kernels against their plain torch forms."""

import pytest
import torch
from cpu_kernel_cases import DTYPES, INSTRUCTION_SETS, relative_error

from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.prefill import prefill_attention
from vllm_lrqk.methods.lrqk.dispatch import force_kernels

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

# Half a unit in the last place of the output's dtype; float32 sums of up to 1,000 products in another order.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def run_prefill(
    name: str,
    tokens: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    kv_heads: int = 2,
    group: int = 4,
    head_size: int = 64,
    page_size: int = 32,
) -> None:
    generator = torch.Generator().manual_seed(tokens + context)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_pages = -(-context // page_size)
    host = torch.full((num_pages + 2, kv_heads, page_size, 2, head_size), torch.nan, dtype=dtype)
    pages = torch.cat([torch.randperm(num_pages, generator=generator) + 1, torch.zeros(3, dtype=torch.int64)])
    for i in range(num_pages):
        count = min(page_size, context - i * page_size)
        host[pages[i], :, :count] = normal(kv_heads, count, 2, head_size)
    wide = normal(tokens, kv_heads * (group + 2), head_size)  # queries, keys and values of one projection
    query, key, value = wide.split([kv_heads * group, kv_heads, kv_heads], 1)
    output = torch.full((tokens, kv_heads * group + 1, head_size), torch.nan, dtype=dtype)
    scale = head_size**-0.5
    with force_kernels(name) as kernels:
        kernels.prefill_attention(query, key, value, host, pages, context, scale, output[:, :-1])
    expected = torch.empty(query.shape)
    prefill_attention(query.float(), key.float(), value.float(), host.float(), pages, context, scale, expected)
    assert relative_error(output[:, :-1], expected) < ROUNDING[dtype]
    assert output[:, -1].isnan().all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
class TestPrefill:
    @pytest.mark.parametrize("tokens", [1, 2, 47, 48, 49, 63, 121, 500])
    @pytest.mark.parametrize("context", [0, 1, 63, 119, 120, 121, 1000])
    def test_lengths(self, name: str, tokens: int, context: int) -> None:
        run_prefill(name, tokens, context)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
    def test_head_size(self, name: str, dtype: torch.dtype, head_size: int) -> None:
        run_prefill(name, 130, 200, dtype, head_size=head_size)

    @pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
    @pytest.mark.parametrize("page_size", [16, 512])
    def test_group_and_page_size(self, name: str, group: int, page_size: int) -> None:
        run_prefill(name, 100, 700, group=group, page_size=page_size)

    def test_large_scores(self, name: str) -> None:
        """Scores of some hundreds: nothing may overflow on the way to the maximum."""
        query, key, value = (30 * torch.randn(3, 200, 2, 64)).unbind(0)
        host, pages = torch.empty(1, 2, 16, 2, 64), torch.zeros(1, dtype=torch.int32)
        output, expected = torch.empty(200, 2, 64), torch.empty(200, 2, 64)
        with force_kernels(name) as kernels:
            kernels.prefill_attention(query, key, value, host, pages, 0, 0.125, output)
        prefill_attention(query, key, value, host, pages, 0, 0.125, expected)
        assert relative_error(output, expected) < 1e-4  # exp() turns 1e-7 of 500 into 5e-5

    def test_threads_do_not_change_the_result(self, name: str) -> None:
        query, key, value = torch.randn(3, 333, 4, 64).unbind(0)
        host, pages = torch.randn(3, 4, 64, 2, 64), torch.arange(3, dtype=torch.int32)
        threads, outputs = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outputs.append(torch.full_like(query, torch.nan))
                with force_kernels(name) as kernels:
                    kernels.prefill_attention(query, key, value, host, pages, 150, 0.125, outputs[-1])
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 63, 500])
def test_append_rows(name: str, dtype: torch.dtype, tokens: int) -> None:
    wide = torch.randn(tokens, 6, 80).to(dtype)
    key, value = wide[:, 1:4], wide[:, 3:6]
    host = torch.full((40, 3, 16, 2, 80), torch.nan, dtype=dtype)
    slot_mapping = torch.randperm(640)[:tokens]
    slot_mapping[::7] = -1
    expected = host.clone()
    append_rows(key, value, expected, slot_mapping)
    with force_kernels(name) as kernels:
        kernels.append_rows(key, value, host, slot_mapping)
    assert torch.equal(host.nan_to_num(-7.0), expected.nan_to_num(-7.0))
