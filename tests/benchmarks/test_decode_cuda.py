"""What of benchmarks/decode_cuda.py needs no GPU: arguments, plan, workload, table."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from cuda_workload import Shape, make_workload
from decode_cuda import config_of, main, parse, plan, shapes_of, table

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


def test_table_marks_what_is_missing() -> None:
    text = table([{"a": 1, "b": 0.123456}, {"a": 20, "b": None}], {"a": "first", "b": "second"})
    assert text.splitlines() == [
        "| first | second |",
        "|-------|--------|",
        "| 1     | 0.1235 |",
        "| 20    | -      |",
    ]
