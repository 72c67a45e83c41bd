"""The CUDA kernels on CPU tensors: csrc/cuda compiled as C++ against tests/support/cuda_emulation."""

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests/support/cuda_emulation"
SOURCES = [
    *sorted((ROOT / "csrc/cuda").rglob("*.cu")),
    *sorted((ROOT / "csrc/bindings").glob("cuda*.cpp")),
    EMULATION / "cuda_emulator.cpp",
]
HEADERS = sorted(path for folder in (ROOT / "csrc", EMULATION) for path in folder.rglob("*.*h"))
TORCH = Path(torch.__file__).parent
FLAGS = [
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DLRQK_NAMESPACE=vllm_lrqk_emulated",
    "-DLRQK_DEVICE=CPU",
    f"-I{EMULATION}",
    f"-I{ROOT / 'csrc'}",
    f"-I{TORCH / 'include'}",
]


def cuda_folder() -> Path | None:
    """Folder of the CUDA toolkit, whose headers define half and bfloat16."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parents[1]] if nvcc else []
    return next((f for f in [*folders, Path("/usr/local/cuda")] if (f / "include/cuda_fp16.h").exists()), None)


@cache
def emulated_operators() -> Any:
    """The emulated operators, compiled when a source has changed; skips the test without compiler or toolkit."""
    cuda, compiler = cuda_folder(), shutil.which("g++")
    if cuda is None or compiler is None:
        pytest.skip("the emulated CUDA kernels need g++ and the CUDA toolkit's headers", allow_module_level=True)
    text = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    mark = hashlib.sha256(text + torch.__version__.encode() + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = ROOT / "build/emulated_cuda"
    library = folder / f"{mark}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, f"-I{cuda / 'include'}"]
        objects = [folder / f"{mark}_{i}.o" for i in range(len(SOURCES))]
        for source, target in zip(SOURCES, objects):
            subprocess.run([compiler, *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch"]
        subprocess.run([compiler, "-shared", *objects, "-o", library, *link], check=True)
        for target in objects:
            target.unlink()
    torch.ops.load_library(str(library))
    return torch.ops.vllm_lrqk_emulated
