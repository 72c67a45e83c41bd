"""Everything for CUDA compiles where nvcc is, GPU or not, and the hot kernels keep their state in registers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine_code
import pytest
import step_model
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import cuda_build  # noqa: E402

NVCC = cuda_build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
MOST_SPILLED_BYTES = 24
"""Of one thread, in any kernel: a few registers that the compiler trades for occupancy, no array."""


class Built(NamedTuple):
    library: Path
    objects: dict[str, Path]
    said: dict[str, str]
    """What the compiler printed, by source."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The whole library for one architecture and PTX, warnings as errors."""
    folder = tmp_path_factory.mktemp("cuda")
    said, objects = {}, {}

    def run(command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        if "-c" in command:
            source = str(Path(command[command.index("-c") + 1]).relative_to(ROOT))
            said[source], objects[source] = result.stderr, Path(command[-1])

    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{torch_folder / 'include'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LRQK_CUDA_ARCHITECTURES", "90")
        patch.setenv("NVCCFLAGS", "-Werror=all-warnings -Xptxas=-v")
        cuda_build.build(folder / "_cuda_kernels.so", folder / "objects", torch_folder, ["g++"], flags, run)
    return Built(folder / "_cuda_kernels.so", objects, said)


@needs_nvcc
@pytest.mark.parametrize("source", cuda_build.SOURCES)
def test_kernels_compile_without_local_arrays(source: str, built: Built) -> None:
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", built.said[source])
    assert len(frames) == built.said[source].count("Compiling entry function")
    assert bool(frames) == ("__global__" in (ROOT / source).read_text())
    for stack, spilled in frames:
        assert int(stack) <= MOST_SPILLED_BYTES
        assert int(spilled) <= MOST_SPILLED_BYTES


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "kernel", "wanted"),
    [
        ("lrqk/score_int8", "score_int8_kernel", {"IMMA.16816.S8.S8": 16, "LDG.E.128": 4, "STG.E.128": 2}),
        ("lrqk/moment_int8", "moment_int8_kernel", {"HMMA.16816.F32": 16, "LDG.E.128": 4, "STG.E.128": 1}),
        ("topk/weigh", "weigh_kernel", {"LDG.E.128": 1, "STG.E.128": 1}),
        ("topk/emit", "emit_kernel", {"LDG.E.128": 2}),
        ("copy", "fetch_kernel", {"LDG.E.128": 1, "STG.E.128": 1}),
        ("copy", "gather_kernel", {"LDG.E.128": 1, "STG.E.128": 1}),
    ],
)
def test_machine_code_is_as_wide_as_meant(source: str, kernel: str, wanted: dict[str, int], built: Built) -> None:
    """Tensor cores, and 16 bytes an access: what the estimates of docs/cuda.md rest on."""
    kernels = machine_code.instructions(built.objects[f"csrc/cuda/{source}.cu"])
    chosen = {name: counts for name, counts in kernels.items() if kernel in name}
    assert chosen, list(kernels)
    for name, counts in chosen.items():
        assert all(counts[instruction] >= least for instruction, least in wanted.items()), (name, counts)


@needs_nvcc
def test_registers_of_the_score_kernels_leave_room_for_other_blocks(built: Built) -> None:
    """Of a thread, for groups of up to 4 query heads: 80 let 24 warps run on a multiprocessor, 128 let 16."""
    for source, most in (("score_int8", 80), ("score_bfloat16", 128)):
        said = built.said[f"csrc/cuda/lrqk/{source}.cu"]
        found = re.findall(rf"{source}_kernelILi(\d+)E(\S*)'.*?Used (\d+) registers", said, re.DOTALL)
        registers = [int(count) for group, _, count in found if int(group) <= 4]
        assert len(registers) >= 6
        # The highest ranks of int8 factors keep four times as many projections.
        assert all(int(count) <= (128 if "Li4EEEvNS" in rest else most)
                   for group, rest, count in found if int(group) <= 4), found  # fmt: skip


@needs_nvcc
def test_the_model_of_the_step_is_that_of_the_built_code(built: Built) -> None:
    """The estimates of docs/cuda.md; another compiler counts otherwise."""
    assert NVCC is not None
    text = (ROOT / "docs/cuda.md").read_text()
    release = re.findall(r"for sm_90 by nvcc (\d+\.\d+)", text)
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    if f"release {release[0]}," not in said:
        pytest.skip(f"the document counts the code of nvcc {release[0]}")
    found = step_model.estimates(built.objects, step_model.Shape(), linear=True)
    for name, now in found.items():
        row = re.search(rf"^\| {name} \|(( [\d.]+ \|){{5}})$", text, re.MULTILINE)
        assert row, name
        written = [float(figure) for figure in row[1].split("|")[:-1]]
        instructions_us = max(now.issue_us, now.units_us)
        actual = [now.bytes / 1e6, now.instructions / 1e6, instructions_us, now.memory_us, now.us]
        assert written == pytest.approx(actual, rel=0.01, abs=0.6), name
    mean = sum(now.us for name, now in found.items() if name != "moment")
    for kind, least in (("linear", mean + found["moment"].us), ("mean", mean)):
        (row,) = re.findall(rf"^\| selection, {kind} values \| \d+ \| (\d+) \|", text, re.MULTILINE)
        assert float(row) == pytest.approx(least, abs=1)


@needs_nvcc
@pytest.mark.parametrize("source", cuda_build.BINDINGS)
def test_bindings_use_the_stable_abi_only(source: str, built: Built) -> None:
    """No symbol of torch's C++ library: those change from version to version."""
    command = ["nm", "-u", str(built.objects[source])]
    undefined = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in undefined
    assert not re.search(r"_ZN\w*(2at|3c10|5torch3jit)", undefined)


@needs_nvcc
def test_library_loads_without_a_gpu(built: Built) -> None:
    """In a process of its own: operators cannot be registered twice."""
    program = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.vllm_lrqk.cuda_select_bytes"
    command = [sys.executable, "-c", program + "(1, 8, 2, 4, 64)[0] > 0)", str(built.library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


def test_triton_kernels_compile() -> None:
    """For the smallest shared memory that is supported (99 KiB) and for the newest target."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests/support/triton_compile.py"), "80", "90"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == 2 * (9 + 9 + 3)
    assert all(item["cubin_bytes"] > 0 and item["shared_bytes"] <= 99 << 10 for item in compiled)
    attends = [item for item in compiled if item["kernel"].startswith("attend")]
    assert all(item["wide_loads"] > 0 for item in attends)
    # In float32 the products are exact, which tensor cores' are not.
    assert all((item["tensor_core_products"] > 0) == ("float32" not in item["kernel"]) for item in attends)


def test_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, question in (("SKIP", cuda_build.is_skipped), ("FORCE", cuda_build.is_forced)):
        for value, answer in (("", False), ("0", False), ("1", True)):
            monkeypatch.setenv(f"VLLM_LRQK_{name}_CUDA", value)
            assert question() is answer


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LRQK_CUDA_ARCHITECTURES", "80;90")
    names = cuda_build.architectures("nvcc", is_local=False)
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
    assert {"80", "86", "89", "90"} <= set(cuda_build.architectures(NVCC, is_local=False))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Lets nvidia-smi print these compute capabilities; without any it fails as it does without a driver."""
    for name in ("VLLM_LRQK_SKIP_CUDA", "VLLM_LRQK_FORCE_CUDA", "VLLM_LRQK_CUDA_ARCHITECTURES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def pretend(capabilities: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{capabilities}'\n" if capabilities else "#!/bin/sh\nexit 9\n")
        program.chmod(0o755)

    return pretend


def test_local_builds_are_for_the_gpus_at_hand(gpus: Callable[[str], None]) -> None:
    gpus("9.0\\n8.6\\n9.0\\n")
    assert cuda_build.is_wanted(is_local=True)
    assert cuda_build.architectures("nvcc", is_local=True) == ["86", "90"]


def test_local_builds_without_a_gpu_leave_cuda_out(
    gpus: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus("")
    assert not cuda_build.is_wanted(is_local=True)
    assert cuda_build.is_wanted(is_local=False)
    monkeypatch.setenv("VLLM_LRQK_CUDA_ARCHITECTURES", "90")
    assert cuda_build.is_wanted(is_local=True)
    monkeypatch.setenv("VLLM_LRQK_SKIP_CUDA", "1")
    assert not cuda_build.is_wanted(is_local=False)


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
