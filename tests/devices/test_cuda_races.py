"""Races and missing barriers of the CUDA kernels, without a GPU: emulated under ThreadSanitizer."""

from pathlib import Path

import pytest
import races

WEIGH = "cuda/topk/weigh.cu"
PLANTED = {
    "a race on shared memory": (
        WEIGH,
        WEIGH,
        "atomicAdd(&histogram[first_digit(key[i])], 1u)",
        "++histogram[first_digit(key[i])]",
        "weigh_kernel",
    ),
    "a missing barrier of the block": (
        WEIGH,
        "cuda/block.cuh",
        "histogram[i] = 0;\n  __syncthreads();",
        "histogram[i] = 0;",
        "clear_bins",
    ),
    "a missing barrier of the warp": (
        "cuda/lrqk/score_int8.cu",
        "cuda/lrqk/score_int8.cu",
        "    }\n  }\n  __syncwarp();\n}",
        "    }\n  }\n}",
        "score_int8_kernel",
    ),
    "a missing fence before the arrival": (
        WEIGH,
        "cuda/block.cuh",
        "  __threadfence();\n  __syncthreads();",
        "  __syncthreads();",
        "is_last_block",
    ),
    "a missing fence of the last block": (
        WEIGH,
        "cuda/block.cuh",
        "return false;\n  __threadfence();",
        "return false;",
        "is_last_block",
    ),
}


def test_no_races_and_the_same_results_in_any_order(tmp_path: Path) -> None:
    program = races.link(list(races.objects().values()), tmp_path / "program")
    code, said = races.run(program, interleavings=2)
    assert code == 0, said[-5000:]
    assert "2 interleavings agree" in said


@pytest.mark.parametrize(("source", "file", "old", "new", "where"), PLANTED.values(), ids=PLANTED)
def test_planted(source: str, file: str, old: str, new: str, where: str, tmp_path: Path) -> None:
    code, said = races.run(races.planted(tmp_path, source, file, old, new), interleavings=1, stops_at_first=True)
    assert code == races.FOUND, said[-5000:]
    assert "data race" in said
    assert where in said
