import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lrqk.methods.lola.format import ALIGNMENT, Memory, MemoryFormat
from vllm_lrqk.methods.lola.settings import LolaSettings

DEFAULT = MemoryFormat(LolaSettings(), 128, torch.bfloat16)


def test_offsets_are_pinned():
    """Kernels rely on these: two means of 512 bytes, [16, 128] and [16, 16] float32, 256 and 236 rows of 512 bytes."""
    assert DEFAULT.sum_offsets == {
        "key_mean": 0,
        "value_mean": 512,
        "cross_moment": 1024,
        "second_moment": 9216,
    }
    assert (DEFAULT.ring_offset, DEFAULT.cache_offset, DEFAULT.positions_offset) == (10240, 141312, 262144)
    assert DEFAULT.block_bytes == 263104


def test_an_8b_model_takes_67_megabytes_per_request():
    """32 layers of 8 KV heads of size 128 in bfloat16; dense attention takes 4.3 GB at 32K tokens."""
    request = DEFAULT.block_bytes * 8 * 32
    assert round(request / 1e6) == 67
    assert 32768 * 2 * 128 * 2 * 8 * 32 / request > 63


@pytest.mark.parametrize("length", [1024, 4096, 65536])
def test_bytes_do_not_depend_on_the_length(length):
    """All rows in use at any length fit into what the block has."""
    settings = LolaSettings()
    updates = settings.updates(length)
    assert length - updates * settings.chunk <= settings.ring_rows
    assert settings.cached(updates) <= settings.cache


@given(
    st.sampled_from(["slope", "hedgehog", "none"]),
    st.integers(1, 20).map(lambda n: 16 * n),
    st.integers(1, 8).map(lambda n: 16 * n),
    st.integers(0, 300),
    st.integers(1, 16).map(lambda n: 4 * n),
    st.integers(2, 32).map(lambda n: 8 * n),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([32, 128]),
)
def test_sections_are_aligned_and_apart(state, window, chunk, cache, rank, head_size, dtype, features):
    maps = "file" if state == "hedgehog" else None
    settings = LolaSettings(
        window=window, chunk=chunk, cache=cache, sink_tokens=0, state=state, state_rank=rank, feature_maps=maps
    )
    f = MemoryFormat(settings, head_size, dtype, features if state == "hedgehog" else 0)
    raw = torch.zeros(2, 3, f.block_bytes, dtype=torch.uint8)
    memory = Memory(raw, f)
    starts = [*f.sum_offsets.values(), f.ring_offset, f.cache_offset, f.positions_offset, f.block_bytes]
    assert all(start % ALIGNMENT == 0 for start in starts)
    # Every byte of a view belongs to that view alone: each adds 1 to its bytes.
    views = [*memory.sums.values(), memory.ring, memory.cache, memory.positions]
    covered = torch.zeros(f.block_bytes, dtype=torch.uint8)
    base = raw.data_ptr()
    for view in views:
        start = view[0, 0].data_ptr() - base if view.numel() else 0
        covered[start : start + view[0, 0].nbytes] += 1
    assert covered.max() <= 1
    assert sum(view[0, 0].nbytes for view in views) == covered.sum()
    assert f.block_bytes - int(covered.sum()) < ALIGNMENT * (len(views) + 1)


def test_views_write_into_the_raw_bytes():
    raw = torch.zeros(2, 3, DEFAULT.block_bytes, dtype=torch.uint8)
    memory = Memory(raw, DEFAULT)
    memory.positions[1, 2, 0] = -1
    memory.cache[1, 2, 0, 0] = -1.0
    assert (raw[1, 2, 262144:262148] == 0xFF).all()
    assert raw[1, 2, 141312:141568].any()
    assert not raw[0].any()


@pytest.mark.parametrize(
    "raw",
    [
        torch.zeros(2, 3, DEFAULT.block_bytes + 1, dtype=torch.uint8),
        torch.zeros(2, 3, DEFAULT.block_bytes, dtype=torch.int8),
        torch.zeros(2, DEFAULT.block_bytes, 3, dtype=torch.uint8).transpose(1, 2),
        torch.zeros(2, DEFAULT.block_bytes, dtype=torch.uint8),
    ],
    ids=["size", "dtype", "stride", "dimensions"],
)
def test_wrong_buffers_are_refused(raw):
    with pytest.raises(ValueError, match=r"uint8 \[blocks, heads, 263104\]"):
        Memory(raw, DEFAULT)
