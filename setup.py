"""Builds the compiled kernels where that is possible; everything else is in pyproject.toml."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
import cuda_build  # noqa: E402

LIBRARY = "vllm_lrqk._cpu_kernels"
TORCH_MINIMUM = (2, 10)  # the first stable ABI with parallel_for
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512}
"""Flags of the sources whose names end so, which x86-64 alone builds."""
FLAGS = [
    f"-I{ROOT / 'csrc'}",
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    f"-DTORCH_TARGET_VERSION=0x{TORCH_MINIMUM[0]:02x}{TORCH_MINIMUM[1]:02x}000000000000",
]


def sources() -> dict[str, list[str]]:
    """The CPU sources, relative to this folder, each with the flags of its instruction set."""
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    found = [*sorted(ROOT.glob("csrc/bindings/cpu*.cpp")), *sorted(ROOT.glob("csrc/cpu/**/*.cpp"))]
    flags = {path: INSTRUCTION_SETS.get(path.stem.rpartition("_")[2], []) for path in found}
    return {str(path.relative_to(ROOT)): of_set for path, of_set in flags.items() if is_x86 or not of_set}


def find_torch() -> Path | None:
    """Folder of the torch package, without importing it: pip's isolated build hides it from the import system."""
    folders = [Path(sysconfig.get_paths()[key]) for key in ("platlib", "purelib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        folders.insert(0, Path(spec.origin).parent.parent)
    for folder in folders:
        if (folder / "torch" / "include" / "torch" / "csrc" / "stable" / "ops.h").exists():
            return folder / "torch"
    return None


def torch_version(torch: Path) -> tuple[int, int]:
    text = (torch / "version.py").read_text()
    match = re.search(r"__version__ = ['\"](\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_compiler() -> list[str] | None:
    """The C++ compiler's command line."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    return [found] if found else None


def what_is_missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if sys.platform != "linux":
        return f"they are not built on {sys.platform}"
    torch = find_torch()
    if torch is None:
        return f"no torch headers under {sysconfig.get_paths()['platlib']} (install torch first)"
    if torch_version(torch) < TORCH_MINIMUM:
        return "torch {}.{} is older than {}.{}".format(*torch_version(torch), *TORCH_MINIMUM)
    return None if find_compiler() else "no C++ compiler (install g++, or set CXX)"


class BuildKernels(build_ext):
    """Compiles each source with the flags of its own instruction set."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python module: one file for every Python version

    def run(self) -> None:
        self.is_local = bool(self.inplace or self.editable_mode)  # run() of the base class resets the first
        super().run()

    def build_extension(self, ext: Extension) -> None:
        is_cuda = ext.name == cuda_build.LIBRARY
        if is_cuda and not cuda_build.is_wanted(self.is_local):
            say_missing("there is no GPU here (VLLM_LRQK_FORCE_CUDA=1 builds them all the same)", "CUDA")
            return
        try:
            self._build(ext)
        except RuntimeError as error:
            if is_cuda and cuda_build.is_forced():
                raise
            print(error, file=sys.stderr)
            say_missing("the compiler failed, see above", "CUDA" if is_cuda else "CPU")

    def _build(self, ext: Extension) -> None:
        torch, compiler = find_torch(), find_compiler()
        assert torch is not None and compiler is not None
        objects_folder = Path(self.build_temp) / "csrc"
        objects_folder.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, f"-I{torch / 'include'}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        if ext.name == cuda_build.LIBRARY:
            library = Path(self.get_ext_fullpath(ext.name))
            cuda_build.build(library, Path(self.build_temp) / "cuda", torch, compiler, flags, self._run, self.is_local)
            return

        def build(source: str) -> str:
            target = str(objects_folder / (source.replace("/", "_") + ".o"))
            self._run([*compiler, *flags, *all_sources[source], "-c", str(ROOT / source), "-o", target])
            return target

        all_sources = sources()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, all_sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self._run([*compiler, "-shared", *objects, "-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"])

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")


class PythonIndependentWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


def say_missing(reason: str, kernels: str = "CPU") -> None:
    instead = {"CPU": "the plain torch forms are used instead", "CUDA": "CUDA devices cannot be served"}[kernels]
    print(f"vllm-lrqk: {kernels} kernels are left out: {reason}; {instead}.", file=sys.stderr)


def extensions() -> list[Extension]:
    """What can be built here; says in one line why the rest is left out."""
    missing = what_is_missing()
    if missing:
        say_missing(missing)
    built = [] if missing else [Extension(LIBRARY, list(sources()), optional=True)]
    missing_cuda = missing or (
        None if cuda_build.find_nvcc() else "no nvcc (install the CUDA toolkit, or set CUDA_HOME)"
    )
    if cuda_build.is_skipped():
        say_missing("VLLM_LRQK_SKIP_CUDA is set", "CUDA")
    elif missing_cuda is None:
        built.append(Extension(cuda_build.LIBRARY, [*cuda_build.SOURCES, *cuda_build.BINDINGS], optional=True))
    elif cuda_build.is_forced():
        raise SystemExit(f"vllm-lrqk: VLLM_LRQK_FORCE_CUDA is set, but CUDA kernels cannot be built: {missing_cuda}.")
    else:
        say_missing(missing_cuda, "CUDA")
    return built


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PythonIndependentWheel},
)
