"""What of benchmarks/decode_cuda.py needs no GPU: arguments, plan, workload, table."""

import mmap
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_runtime import InvalidCopy, RegisteredCopies, Runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import cuda_workload
from cuda_workload import Shape, copy_pages, make_workload
from decode_cuda import config_of, main, parse, plan, shapes_of, table

from vllm_lrqk.devices.pinned import PinnedMemory, chunk_rows
from vllm_lrqk.methods.lrqk.decode import decode_attention
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

SMALL = Shape(length=77, batch=3, heads=4, kv_heads=2, head_size=32, dtype=torch.float32)
CONFIG = LRQKSettings(rank=8, page_size=16, top_k=20, recent_tokens=5)


def test_dry_run_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--lengths", "131072", "8192", "--batches", "1", "8", "--host-gib", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["8192", "8192", "131072", "131072"]
    assert ["more than" in line for line in lines[2:]] == [False, False, False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_says_that_there_is_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", "8192"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--heads", "30"], ["--lengths", "0"], ["--miss-rates", "1.5"], ["--dtype", "int8"], ["--repeats", "0"]]
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(wrong)


def test_plan_counts_bytes() -> None:
    """Llama-3.1-8B's layer at 128K: 4 KiB of keys and values per token; rank 16 in int8 is about 34 bytes per head."""
    options = parse(["--lengths", "131072", "--batches", "8"])
    shape, config = shapes_of(options)[0], config_of(options)
    assert shape.host_bytes(config) == 8 * 513 * 256 * 4096
    per_head_token = shape.factor_bytes(config) / (8 * 131072 * 8)
    assert 33 < per_head_token < 36
    assert plan(options)[0]["host_gib"] == pytest.approx(4.0, rel=0.01)
    assert shape.host_bytes(config) / shape.device_bytes(config) > 10


def test_workload_decodes() -> None:
    """Every request's length is full of tokens, and a step over all of them is dense attention."""
    config = LRQKSettings(rank=8, page_size=16, top_k=100, recent_tokens=5)
    seal = lambda pages, host, factors: seal_pages(pages, host, factors, config)  # noqa: E731
    w = make_workload(SMALL, config, torch.device("cpu"), seal)
    assert w.block_table.shape == (3, 6)
    assert sorted(w.block_table.flatten().tolist()) == list(range(18))
    assert torch.equal(w.slot_mapping % 16, torch.full((3,), 76 % 16))
    assert torch.equal(w.slot_mapping // 16, w.block_table[:, 4].long())
    assert w.host.isfinite().all()
    output = torch.empty(w.query.shape)
    decode_attention(w.query, w.host, w.factors, w.block_table, w.seq_lens, w.scale, config, output)
    rows = w.host[w.block_table.long()].transpose(1, 2).flatten(2, 3)[:, :, :77]
    dense = torch.nn.functional.scaled_dot_product_attention(
        w.query[:, :, None], rows[..., 0, :], rows[..., 1, :], scale=w.scale, enable_gqa=True
    )
    torch.testing.assert_close(output, dense[:, :, 0], rtol=1e-4, atol=1e-5)


class TestRegisteredPages:
    """Two pages of the host to a registration: the benchmark's copies go from border to border, as a GPU asks."""

    SHAPE = Shape(length=77, batch=1, heads=4, kv_heads=2, head_size=32, dtype=torch.float32)
    CHUNK_BYTES = 2 * 2 * mmap.PAGESIZE

    @pytest.fixture
    def copies(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[RegisteredCopies]:
        monkeypatch.setattr(cuda_workload, "chunk_rows", partial(chunk_rows, chunk_bytes=self.CHUNK_BYTES))
        with RegisteredCopies(Runtime()) as mode:
            yield mode

    def make(self, copies: RegisteredCopies) -> cuda_workload.Workload:
        def pin(host: torch.Tensor) -> torch.Tensor:
            self.memory = PinnedMemory(host, copies.runtime, self.CHUNK_BYTES)
            return host

        return make_workload(self.SHAPE, CONFIG, torch.device("cpu"), lambda *args: None, pin)

    def test_no_copy_reaches_into_two_registrations(self, copies: RegisteredCopies) -> None:
        w = self.make(copies)
        assert len(copies.runtime.registered) == 3
        assert copies.copies == 3
        pages = torch.empty_like(w.host)
        copy_pages(pages, w.host)
        assert copies.copies == 6
        assert torch.equal(pages, w.host)

    @pytest.mark.parametrize("first", [1, 3])
    def test_planted_copies_are_found(self, copies: RegisteredCopies, first: int) -> None:
        """A copy of two pages, the border between them: by the benchmark itself, and by hand."""
        w = self.make(copies)
        pages = torch.empty_like(w.host)
        for source in (w.host[first : first + 2], w.host.transpose(1, 2)[first : first + 2]):
            with pytest.raises(InvalidCopy):
                pages[:2].copy_(source.reshape(pages[:2].shape))
        cuda_workload.chunk_rows.keywords["chunk_bytes"] = 1 << 30
        with pytest.raises(InvalidCopy):
            copy_pages(pages, w.host)


def test_table_marks_what_is_missing() -> None:
    text = table([{"a": 1, "b": 0.123456}, {"a": 20, "b": None}], {"a": "first", "b": "second"})
    assert text.splitlines() == [
        "| first | second |",
        "|-------|--------|",
        "| 1     | 0.1235 |",
        "| 20    | -      |",
    ]
