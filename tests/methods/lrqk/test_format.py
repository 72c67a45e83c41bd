import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lrqk.methods.lrqk.format import ALIGNMENT, FactorPages, PageFormat

DEFAULT = PageFormat(page_size=256, head_size=128, rank=16)


@pytest.mark.parametrize(
    ("page_format", "offsets", "bytes_per_token"),
    [
        (DEFAULT, (4096, 6144, 6208), 26),
        (PageFormat(256, 64, 16), (4096, 5120, 5184), 21),
        (PageFormat(256, 128, 16, torch.bfloat16), (8192, 12288, 12352), 50),
        (PageFormat(16, 128, 16), (256, 2304, 2368), 164),
        (PageFormat(64, 96, 4), (256, 640, 704), 14),
    ],
)
def test_offsets_are_pinned(page_format, offsets, bytes_per_token):
    """Kernels rely on these; 256 * 16 = 4096 bytes of A, then 16 * 128 of X, 16 float32 and 128 bfloat16."""
    assert (
        page_format.projection_offset,
        page_format.projection_scale_offset,
        page_format.value_mean_offset,
    ) == offsets
    assert page_format.bytes_per_token == bytes_per_token
    assert page_format.page_bytes == bytes_per_token * page_format.page_size


@pytest.mark.parametrize(
    ("page_format", "offsets", "bytes_per_token"),
    [
        (PageFormat(256, 128, 16, value_rank=8), (6464, 7488, 7552), 30),
        (PageFormat(512, 128, 16, value_rank=8), (10560, 11584, 11648), 23),
        (PageFormat(64, 96, 4, torch.bfloat16, value_rank=4), (1536, 2304, 2368), 38),
    ],
)
def test_offsets_of_values_are_pinned(page_format, offsets, bytes_per_token):
    f = page_format
    assert (f.value_projection_offset, f.value_scale_offset, f.key_factor_mean_offset) == offsets
    assert f.bytes_per_token == bytes_per_token


def test_default_page_is_a_twentieth_of_its_keys_and_values():
    keys_and_values = 256 * 2 * 128 * 2
    assert 19 < keys_and_values / DEFAULT.page_bytes < 20


@given(
    st.sampled_from([16, 32, 64, 128, 256, 512, 1024]),
    st.integers(4, 32).map(lambda n: 8 * n),
    st.integers(1, 16).map(lambda n: 4 * n),
    st.sampled_from([torch.int8, torch.bfloat16]),
    st.sampled_from([0, 4, 8]),
)
def test_sections_are_aligned_and_apart(page_size, head_size, rank, dtype, value_rank):
    f = PageFormat(page_size, head_size, rank, dtype, value_rank)
    ends = [
        page_size * rank * dtype.itemsize,
        f.projection_offset + rank * head_size * dtype.itemsize,
        f.projection_scale_offset + rank * 4,
        f.value_mean_offset + head_size * 2,
    ]
    starts = [f.projection_offset, f.projection_scale_offset, f.value_mean_offset]
    if value_rank:
        starts += [f.value_projection_offset, f.value_scale_offset, f.key_factor_mean_offset]
        ends += [
            f.value_projection_offset + value_rank * head_size * dtype.itemsize,
            f.value_scale_offset + value_rank * 4,
            f.key_factor_mean_offset + value_rank * 4,
        ]
    starts.append(f.page_bytes)
    for end, start in zip(ends, starts):
        assert end <= start
        assert start % ALIGNMENT == 0
    assert f.page_bytes - ends[-1] < 2 * ALIGNMENT + page_size


def numbered(f: PageFormat, num_pages: int = 2, kv_heads: int = 3) -> FactorPages:
    """Pages whose bytes are random."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (num_pages, kv_heads, f.page_bytes), dtype=torch.uint8, generator=generator)
    return FactorPages(raw, f)


def test_key_factor_is_stored_in_words_of_one_token():
    """Byte of A[n, j] in an int8 page: word j // 4, token n, byte j % 4."""
    factors = numbered(DEFAULT)
    a = factors.key_factor(torch.tensor([1]))[0]  # [KV, N, r]
    for n, j in ((0, 0), (0, 5), (7, 3), (255, 15)):
        expected = factors.raw[1, 2, (j // 4) * 256 * 4 + n * 4 + j % 4].view(torch.int8)
        assert int(a[2, n, j]) == int(expected)


def test_bfloat16_words_hold_two_elements():
    f = PageFormat(64, 64, 8, torch.bfloat16)
    factors = numbered(f)
    a = factors.key_factor(torch.tensor([0, 1]))
    elements = factors.raw[:, :, : f.projection_offset].view(torch.bfloat16)
    for n, j in ((0, 0), (3, 5), (63, 7)):
        expected = elements[1, 0, (j // 2) * 64 * 2 + n * 2 + j % 2]
        assert torch.equal(a[1, 0, n, j].view(torch.int16), expected.view(torch.int16))


def test_views_start_at_their_offsets():
    factors = numbered(DEFAULT)
    raw = factors.raw[1, 2]
    assert torch.equal(factors.projection[1, 2], raw[4096:6144].view(torch.int8).view(16, 128))
    assert torch.equal(factors.projection_scale[1, 2].view(torch.uint8), raw[6144:6208])
    assert torch.equal(factors.value_mean[1, 2].view(torch.uint8), raw[6208:6464])


def test_views_write_into_the_raw_bytes():
    factors = numbered(DEFAULT)
    factors.projection_scale[0, 1] = 0.0
    assert bool((factors.raw[0, 1, 6144:6208] == 0).all())


@pytest.mark.parametrize(
    "raw",
    [
        torch.zeros(2, 3, DEFAULT.page_bytes + 1, dtype=torch.uint8),
        torch.zeros(2, 3, DEFAULT.page_bytes, dtype=torch.int8),
        torch.zeros(2, DEFAULT.page_bytes, 3, dtype=torch.uint8).transpose(1, 2),
    ],
    ids=["size", "dtype", "stride"],
)
def test_wrong_buffers_are_refused(raw):
    with pytest.raises(ValueError, match=r"uint8 \[pages, heads, 6656\]"):
        FactorPages(raw, DEFAULT)
