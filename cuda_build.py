"""How setup.py builds the CUDA kernels.

VLLM_LRQK_SKIP_CUDA=1             leave them out
VLLM_LRQK_FORCE_CUDA=1            fail where they cannot be built
VLLM_LRQK_CUDA_ARCHITECTURES      what to build for, such as "90" or "80;90"; default: all of ARCHITECTURES
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


def architectures(nvcc: str) -> list[str]:
    """What to build for: those of ARCHITECTURES that this nvcc knows, or what the environment names."""
    chosen = os.environ.get("VLLM_LRQK_CUDA_ARCHITECTURES")
    if chosen:
        return chosen.replace(",", ";").split(";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES if f"compute_{name}" in known]


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
) -> None:
    """Compile and link `library`.

    Args:
        torch: folder of the torch package.
        compiler, flags: C++ compiler and its flags, for the bindings.
        run: runs one command.
    """
    nvcc = find_nvcc()
    assert nvcc is not None
    objects_folder.mkdir(parents=True, exist_ok=True)
    cuda, code = toolkit(nvcc), code_flags(architectures(nvcc))

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
