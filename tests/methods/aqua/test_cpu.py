"""AQUA's compiled CPU kernels against their plain torch forms."""

import pytest
import torch
from aqua_cases import Requests
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import relative

from vllm_lrqk.devices.cpu import instruction_sets
from vllm_lrqk.methods.aqua import cpu
from vllm_lrqk.methods.aqua.kernels import TORCH
from vllm_lrqk.methods.aqua.settings import AquaSettings

INSTRUCTION_SETS = instruction_sets()
pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="CPU kernels are not built")

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of outputs: both round to the type once, and sum in float32 in other orders."""
QUERY_STEPS = 5e-4
"""int8 keys meet queries of 16 bits: each dimension moves a score by half a step of 1 / 32767 of the largest one, and a
weight by as much as its score. With scores up to 30, whose terms are some times larger than their sum, that is 1e-3 at
worst, and less where several tokens share the weight."""


def both(name, lengths, config, **shape):
    """The same requests with the kernels of an instruction set and in plain torch."""
    return [Requests(lengths, config, kernels=kernels, **shape) for kernels in (cpu.kernels(name), TORCH)]


def fill(requests, lengths):
    """Every token but the last of each request."""
    chunks = [(r, 0, n - 1) for r, n in enumerate(lengths) if n > 1]
    if chunks:
        requests.run([], chunks)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("key_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    ("keep", "choose", "stored"),
    [(1.0, "kv_head", 1.0), (0.75, "kv_head", 1.0), (0.5, "query_head", 1.0), (0.6, "kv_head", 0.75)],
)
def test_decode_is_the_torch_form(name, dtype, key_dtype, keep, choose, stored):
    config = AquaSettings(keep=keep, choose=choose, stored=stored, key_dtype=key_dtype)
    lengths = [1, 63, 500, 33, 64]
    compiled, plain = both(name, lengths, config, block_size=32, d=64, group=7, dtype=dtype)
    fill(plain, lengths)
    compiled.layer.blocks.raw.copy_(plain.layer.blocks.raw)
    last = [(r, n - 1) for r, n in enumerate(lengths)]
    expected, output = plain.run(last, []), compiled.run(last, [], padding=2)
    assert not output.isnan().any()
    assert relative(output, expected) < TOLERANCES[dtype] + QUERY_STEPS * (key_dtype == "int8")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("config", [AquaSettings(), AquaSettings(stored=0.5), AquaSettings(key_dtype="int8")])
def test_append_is_the_torch_form(name, dtype, config):
    lengths = [63, 500, 1]
    compiled, plain = both(name, lengths, config, block_size=32, d=64, dtype=dtype)
    for requests in (compiled, plain):
        fill(requests, lengths)
        requests.run([(r, n - 1) for r, n in enumerate(lengths)], [], padding=3)
    ours, theirs = compiled.layer.blocks, plain.layer.blocks
    assert torch.equal(ours.value.nan_to_num(7.0), theirs.value.nan_to_num(7.0))
    if config.key_dtype == "int8":
        is_token = ~theirs.key_scale.isnan()
        assert torch.equal(is_token, ~ours.key_scale.isnan())
        torch.testing.assert_close(ours.key_scale[is_token], theirs.key_scale[is_token], rtol=1e-5, atol=0)
        difference = (ours.key.int() - theirs.key.int()).abs()
        # Sums in another order cross a rounding border now and then.
        assert int(difference.max()) <= 1 and float((difference > 0).float().mean()) < 1e-3
    else:
        step = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
        assert torch.equal(ours.key.isnan(), theirs.key.isnan())
        torch.testing.assert_close(ours.key.nan_to_num(0), theirs.key.nan_to_num(0), atol=step, rtol=step)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(INSTRUCTION_SETS or ["none"]),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    block_size=st.sampled_from([16, 32, 48, 128]),
    d=st.sampled_from([32, 64, 80, 96]),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    keep=st.floats(0.05, 1.0),
    stored=st.floats(0.1, 1.0),
    choose=st.sampled_from(["kv_head", "query_head"]),
    key_dtype=st.sampled_from(["auto", "int8"]),
)
def test_any_shape(name, lengths, block_size, d, group, kv_heads, keep, stored, choose, key_dtype):
    config = AquaSettings(keep=keep, choose=choose, stored=stored, key_dtype=key_dtype)
    compiled, plain = both(name, lengths, config, block_size=block_size, kv_heads=kv_heads, group=group, d=d)
    fill(plain, lengths)
    compiled.layer.blocks.raw.copy_(plain.layer.blocks.raw)
    last = [(r, n - 1) for r, n in enumerate(lengths)]
    expected, output = plain.run(last, []), compiled.run(last, [])
    assert relative(output, expected) < TOLERANCES[torch.float32] + QUERY_STEPS * (key_dtype == "int8")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_a_request_alone_and_in_company_are_bit_equal(name, threads):
    lengths = [5000, 63, 2049]
    config = AquaSettings(keep=0.5)
    requests, _ = both(name, lengths, config, block_size=32, kv_heads=1, group=4, d=32)
    fill(requests, lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = requests.run([(r, n - 1) for r, n in enumerate(lengths)], [])
        alone = [requests.run([(r, n - 1)], []) for r, n in enumerate(lengths)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_padding_gives_zeros(name):
    requests, _ = both(name, [40], AquaSettings(), block_size=32, d=32)
    fill(requests, [40])
    layer = requests.layer
    query = torch.cat([requests.query[0][-1:], torch.full((1, 6, 32), torch.nan)])
    output = torch.full_like(query, torch.nan)
    table = torch.stack([requests.tables[0], torch.full_like(requests.tables[0], 1 << 30)])
    lens = torch.tensor([39, 0]).int()
    layer.kernels.decode_attention(query, layer.blocks, layer.basis, table, lens, 1.0, layer.config, output)
    assert not output[0].isnan().any() and (output[1] == 0).all()
