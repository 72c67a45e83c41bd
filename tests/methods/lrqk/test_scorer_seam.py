"""Another scorer is another file: decode.h selects by a scorer of the tests, walked whole and split into ranges."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
PAGE_SIZE, HEAD_SIZE, TOP_K = 64, 16, 50


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    target = tmp_path_factory.mktemp("scorer") / "scorer.so"
    sources = [ROOT / "tests/support/stored_scorer.cpp", ROOT / "csrc/cpu/scratch.cpp"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, *sources, "-o", target], check=True)
    return ctypes.CDLL(str(target))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [63, 500, 20001])
def test_selects_by_its_scores(library: ctypes.CDLL, threads: int, length: int) -> None:
    """The top_k highest scores of sealed pages, and every later token. One item is split where there are threads."""
    pages = -(-length // PAGE_SIZE)
    scores = torch.randn(pages, PAGE_SIZE) * 3
    table = torch.randperm(pages, dtype=torch.int32)
    positions = torch.full((TOP_K + PAGE_SIZE,), -7, dtype=torch.int32)
    query = torch.randn(HEAD_SIZE)
    library.select_stored(
        *(ctypes.c_void_p(x.data_ptr()) for x in (query, scores, table)),
        ctypes.c_int32(length),
        *(ctypes.c_int64(x) for x in (HEAD_SIZE, PAGE_SIZE, TOP_K)),
        ctypes.c_void_p(positions.data_ptr()),
        ctypes.c_int64(len(positions)),
        ctypes.c_int(threads),
    )
    sealed = (length - 1) // PAGE_SIZE * PAGE_SIZE
    by_position = scores[table.long()].flatten()[:sealed]
    found = positions[positions >= 0].long()
    selected, always = found[: min(TOP_K, sealed)], found[min(TOP_K, sealed) :]
    assert always.tolist() == list(range(sealed, length))
    # Weights are rounded to bfloat16, 2^-9 of them, and their exponentials are good to 1e-4.
    least = by_position.topk(min(TOP_K, sealed)).values.min() if sealed else 0.0
    assert selected.unique().tolist() == selected.tolist()
    assert bool((by_position[selected] >= least - 0.01).all())
    assert (positions[len(found) :] == -1).all()
