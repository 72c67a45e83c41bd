import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.settings import AquaSettings

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("config", "offsets", "bytes_per_token"),
    [
        (AquaSettings(), (32768, 65536), 512),
        (AquaSettings(stored=0.75), (24576, 57344), 448),
        (AquaSettings(key_dtype="int8"), (16384, 49152), 388),
        (AquaSettings(key_dtype="int8", stored=0.5), (8192, 40960), 324),
    ],
)
def test_offsets_are_pinned(config, offsets, bytes_per_token):
    """Kernels rely on these; 128 tokens of 128 dimensions in bfloat16."""
    f = BlockFormat.from_config(config, 128, 128, BF16)
    assert (f.value_offset, f.key_scale_offset) == offsets
    assert f.bytes_per_token == bytes_per_token
    assert f.block_bytes == 128 * bytes_per_token


def test_three_quarters_of_the_dimensions_are_seven_eighths_of_the_bytes():
    dense = 2 * 128 * 2
    assert BlockFormat.from_config(AquaSettings(stored=0.75), 128, 128, BF16).bytes_per_token / dense == 0.875


@given(
    st.integers(1, 16).map(lambda n: 16 * n),
    st.integers(1, 32).map(lambda n: 8 * n),
    st.floats(0.01, 1.0),
    st.sampled_from(["auto", "int8"]),
    st.sampled_from([torch.float32, torch.float16, BF16]),
)
def test_sections_are_aligned_apart_and_inside(block_size, head_size, stored, key_dtype, dtype):
    f = BlockFormat.from_config(AquaSettings(stored=stored, key_dtype=key_dtype), block_size, head_size, dtype)
    blocks = Blocks(torch.zeros(2, 3, f.block_bytes, dtype=torch.uint8), f)
    sections = [blocks.key, blocks.value, *([blocks.key_scale] if f.is_quantized else [])]
    for number, section in enumerate(sections, 1):
        assert section.data_ptr() % 16 == 0
        section.fill_(number)
    assert [bool((section == number).all()) for number, section in enumerate(sections, 1)] == [True] * len(sections)
    used = sum(section[0, 0].numel() * section.element_size() for section in sections)
    assert used == f.block_bytes


def test_memory_of_another_size_is_refused():
    f = BlockFormat.from_config(AquaSettings(), 16, 32, torch.float32)
    with pytest.raises(ValueError, match=r"blocks must be uint8 \[blocks, heads, 4096\]"):
        Blocks(torch.zeros(2, 1, f.block_bytes + 1, dtype=torch.uint8), f)
