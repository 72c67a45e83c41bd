"""Everything for CUDA compiles where nvcc is, GPU or not, and the hot kernels keep their state in registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import cuda_build  # noqa: E402

NVCC = cuda_build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
MOST_SPILLED_BYTES = 16
"""Of one thread, in any kernel: a few registers that the compiler trades for occupancy, no array."""


@needs_nvcc
@pytest.mark.parametrize("source", cuda_build.SOURCES)
def test_kernels_compile_without_local_arrays(source: str, tmp_path: Path) -> None:
    assert NVCC is not None
    target = ["-c", str(ROOT / source), "-o", str(tmp_path / "kernels.o")]
    command = [
        NVCC,
        *cuda_build.NVCC_FLAGS,
        *cuda_build.code_flags(["90"]),
        "-Werror=all-warnings",
        "-Xptxas=-v",
        *target,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert len(frames) == result.stderr.count("Compiling entry function")
    assert bool(frames) == ("__global__" in (ROOT / source).read_text())
    for stack, spilled in frames:
        assert int(stack) <= MOST_SPILLED_BYTES
        assert int(spilled) <= MOST_SPILLED_BYTES


@needs_nvcc
@pytest.mark.parametrize("source", cuda_build.BINDINGS)
def test_bindings_compile_and_use_the_stable_abi_only(source: str, tmp_path: Path) -> None:
    """No symbol of torch's C++ library: those change from version to version."""
    assert NVCC is not None
    target = tmp_path / "bindings.o"
    packages = (cuda_build.toolkit(NVCC), Path(torch.__file__).parent)
    include = [f"-I{ROOT / 'csrc'}", *(f"-I{folder / 'include'}" for folder in packages)]
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    subprocess.run(["g++", *flags, *include, "-c", str(ROOT / source), "-o", str(target)], check=True)
    undefined = subprocess.run(["nm", "-u", str(target)], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in undefined
    assert not re.search(r"_ZN\w*(2at|3c10|5torch3jit)", undefined)


def test_triton_kernels_compile() -> None:
    """For the smallest shared memory that is supported (99 KiB) and for the newest target."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests/support/triton_compile.py"), "80", "90"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == 2 * (9 + 6 + 3 + 2)
    assert all(item["cubin_bytes"] > 0 and item["shared_bytes"] <= 99 << 10 for item in compiled)
    assert all(item["wide_loads"] > 0 for item in compiled if item["kernel"].startswith("attend"))


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, question in (("SKIP", cuda_build.is_skipped), ("FORCE", cuda_build.is_forced)):
        for value, answer in (("", False), ("0", False), ("1", True)):
            monkeypatch.setenv(f"VLLM_LRQK_{name}_CUDA", value)
            assert question() is answer


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LRQK_CUDA_ARCHITECTURES", "80;90")
    names = cuda_build.architectures("nvcc")
    assert names == ["80", "90"]
    assert cuda_build.code_flags(names) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@needs_nvcc
def test_default_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LRQK_CUDA_ARCHITECTURES", raising=False)
    assert NVCC is not None
    assert {"80", "86", "89", "90"} <= set(cuda_build.architectures(NVCC))


def setup_says(**environment: str) -> tuple[int, str]:
    """Return code and standard error of `setup.py --version`."""
    inherited = {"PATH": "/nowhere", "HOME": os.environ.get("HOME", "/")}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=inherited | environment)
    return result.returncode, result.stderr


def test_says_why_kernels_are_left_out() -> None:
    code, said = setup_says(VLLM_LRQK_SKIP_CUDA="1")
    assert code == 0
    assert "CUDA kernels are left out: VLLM_LRQK_SKIP_CUDA is set" in said


def test_force_refuses_without_compiler() -> None:
    code, said = setup_says(VLLM_LRQK_FORCE_CUDA="1")
    assert code != 0
    assert "VLLM_LRQK_FORCE_CUDA is set, but CUDA kernels cannot be built: no C++ compiler" in said
