"""How setup.py builds the CUDA kernels.

A wheel gets machine code for all ARCHITECTURES. A build in place (pip install -e, build_ext --inplace) is for the
machine at hand: for its GPUs, and without CUDA kernels where it has none.

VLLM_LRQK_SKIP_CUDA=1             leave them out
VLLM_LRQK_FORCE_CUDA=1            build them in any case; fail where that cannot be
VLLM_LRQK_CUDA_ARCHITECTURES      build them for these, such as "90" or "80;90"
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent
LIBRARY = "vllm_lrqk._cuda_kernels"
SOURCES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/cuda/**/*.cu"))]
BINDINGS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/bindings/cuda*.cpp"))]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
NVCC_FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def is_skipped() -> bool:
    return os.environ.get("VLLM_LRQK_SKIP_CUDA", "0") not in ("", "0")


def is_forced() -> bool:
    return os.environ.get("VLLM_LRQK_FORCE_CUDA", "0") not in ("", "0")


def local_architectures() -> list[str]:
    """Those of this machine's GPUs, such as "90"; none where the driver finds no GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if answer.returncode:
        return []
    return sorted({line.strip().replace(".", "") for line in answer.stdout.splitlines()} - {""}, key=int)


def find_nvcc() -> str | None:
    """The compiler on the path, or of $CUDA_HOME, or of /usr/local/cuda."""
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{folder}/bin/nvcc" for folder in folders if folder)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def toolkit(nvcc: str) -> Path:
    """Folder of the toolkit: nvcc on the path may be a link or a script that starts the real one."""
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1] for line in output.splitlines() if line.startswith("#$ TOP=")), None)
    return Path(top).resolve() if top else Path(nvcc).resolve().parents[1]


def architectures(nvcc: str, is_local: bool) -> list[str]:
    """What to build for: what the environment names, or this machine's GPUs for a local build, or all.

    Args:
        is_local: the build is for this machine alone.
    """
    named = os.environ.get("VLLM_LRQK_CUDA_ARCHITECTURES", "").replace(",", ";").split(";")
    chosen = [name for name in named if name] or (local_architectures() if is_local else [])
    if chosen:
        return chosen
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES if f"compute_{name}" in known]


def is_wanted(is_local: bool) -> bool:
    """Whether to build them where that is possible."""
    asked = is_forced() or os.environ.get("VLLM_LRQK_CUDA_ARCHITECTURES")
    return not is_skipped() and (bool(asked) or not is_local or bool(local_architectures()))


def code_flags(names: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the last for devices to come."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def build(
    library: Path,
    objects_folder: Path,
    torch: Path,
    compiler: list[str],
    flags: list[str],
    run: Callable[[list[str]], None],
    is_local: bool = False,
) -> None:
    """Compile and link `library`.

    Args:
        torch: folder of the torch package.
        compiler, flags: C++ compiler and its flags, for the bindings.
        run: runs one command.
        is_local: see `architectures`.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    objects_folder.mkdir(parents=True, exist_ok=True)
    cuda, code = toolkit(nvcc), code_flags(architectures(nvcc, is_local))

    def compile_source(source: str) -> str:
        target = str(objects_folder / (source.replace("/", "_") + ".o"))
        if source in BINDINGS:
            command = [*compiler, *flags, f"-I{cuda / 'include'}"]
        else:
            command = [nvcc, *NVCC_FLAGS, *code, *shlex.split(os.environ.get("NVCCFLAGS", ""))]
        run([*command, "-c", str(ROOT / source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, [*SOURCES, *BINDINGS]))
    # A CUDA runtime of its own, and hidden: torch brings another one, whose version need not be the same.
    runtime = [f"-L{cuda / 'lib64'}", "-Wl,--exclude-libs,ALL", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler, "-shared", *objects, "-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch", *runtime])
