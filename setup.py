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
LIBRARY = "vllm_lrqk._cpu_kernels"
TORCH_MINIMUM = (2, 10)  # the first stable ABI with parallel_for
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
SOURCES = {
    "csrc/bindings.cpp": [],
    "csrc/cpu/dispatch.cpp": [],
    "csrc/cpu/scratch.cpp": [],
    "csrc/cpu/kernels_portable.cpp": [],
}
if platform.machine() in ("x86_64", "AMD64"):
    SOURCES |= {"csrc/cpu/kernels_avx2.cpp": AVX2, "csrc/cpu/kernels_avx512.cpp": AVX512}
FLAGS = [
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

    def build_extension(self, ext: Extension) -> None:
        torch, compiler = find_torch(), find_compiler()
        assert torch is not None and compiler is not None
        objects_folder = Path(self.build_temp) / "csrc"
        objects_folder.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, f"-I{torch / 'include'}", *shlex.split(os.environ.get("CXXFLAGS", ""))]

        def build(source: str) -> str:
            target = str(objects_folder / (Path(source).stem + ".o"))
            self._run([*compiler, *flags, *SOURCES[source], "-c", str(ROOT / source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, SOURCES))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self._run([*compiler, "-shared", *objects, "-o", str(library), f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"])

    def _run(self, command: list[str]) -> None:
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")

    def run(self) -> None:
        try:
            super().run()
        except RuntimeError as error:
            print(error, file=sys.stderr)
            say_missing("the compiler failed, see above")


class PythonIndependentWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


def say_missing(reason: str) -> None:
    print(f"vllm-lrqk: CPU kernels are left out: {reason}; the plain torch forms are used instead.", file=sys.stderr)


missing = what_is_missing()
# pip runs this file for the metadata as well: say it once.
if missing and not {"egg_info", "dist_info"} & set(sys.argv):
    say_missing(missing)
setup(
    ext_modules=[] if missing else [Extension(LIBRARY, list(SOURCES), optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PythonIndependentWheel},
)
