"""Every header of csrc compiles by itself, as an editor or clang-tidy opens it."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import EMULATION, ROOT, cuda_folder

HEADERS = sorted(path for pattern in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(pattern))
INSTRUCTION_SETS = {
    "avx2.h": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.h": [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")],
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.parametrize("header", HEADERS, ids=[str(path.relative_to(ROOT)) for path in HEADERS])
def test_header_compiles_alone(header: Path) -> None:
    include = [ROOT / "csrc", EMULATION, Path(torch.__file__).parent / "include"]
    if "cuda" in str(header.relative_to(ROOT)):
        cuda = cuda_folder()
        if cuda is None:
            pytest.skip("the CUDA toolkit is not installed")
        include.append(cuda / "include")
    if header.name in INSTRUCTION_SETS and platform.machine() != "x86_64":
        pytest.skip("of x86-64")
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *INSTRUCTION_SETS.get(header.name, [])]
    command = ["g++", *flags, *(f"-I{folder}" for folder in include), "-x", "c++", "-include", str(header), "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
