"""Builds the CUDA kernels for ThreadSanitizer with the race emulator of tests/support/cuda_emulation, and runs them."""

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from emulated import EMULATION, HEADERS, ROOT, cuda_folder, emulated_operators

from vllm_lrqk.methods.lrqk.format import PageFormat

KERNELS = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
PROGRAM = EMULATION / "race_check.cpp"
RUNTIME = EMULATION / "race_emulator.cpp"
# Without points-to analysis the compiler leaves out accesses to shared memory whose address goes nowhere.
FLAGS = ["-std=c++20", "-O1", "-fno-tree-pta", "-g", "-Wno-unknown-pragmas", "-DLRQK_FIND_RACES", f"-I{EMULATION}"]
PAGE = PageFormat(page_size=256, head_size=32, rank=8, factor_dtype=torch.int8, value_rank=8)
FOUND = 66


def compile_source(source: Path, target: Path, csrc: Path, is_instrumented: bool = True) -> None:
    cuda = cuda_folder()
    flags = [*FLAGS, *(["-fsanitize=thread"] if is_instrumented else []), f"-I{csrc}", f"-I{cuda}/include"]
    subprocess.run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)


def link(objects: list[Path], program: Path) -> Path:
    subprocess.run(["g++", "-fsanitize=thread", *map(str, objects), "-o", str(program)], check=True)
    return program


@cache
def objects() -> dict[Path, Path]:
    """Object file of each source; compiled when one has changed. Skips without compiler, toolkit or sanitizer."""
    if cuda_folder() is None or shutil.which("g++") is None:
        pytest.skip("the emulated CUDA kernels need g++ and the CUDA toolkit's headers")
    library = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ comes without ThreadSanitizer")
    sources = [RUNTIME, *KERNELS, PROGRAM]  # templates of the first count: those of the runtime must order nothing
    text = b"".join(path.read_bytes() for path in [*sources, *HEADERS])
    mark = hashlib.sha256(text + " ".join(FLAGS).encode()).hexdigest()[:16]
    folder = ROOT / "build/races" / mark
    targets = {source: folder / (source.stem + ".o") for source in sources}
    if not (folder / "complete").exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        for source, target in targets.items():
            compile_source(source, target, ROOT / "csrc", source != RUNTIME)
        (folder / "complete").touch()
    return targets


def planted(folder: Path, source: str, file: str, old: str, new: str) -> Path:
    """The program with `old` in one file of csrc replaced by `new`, where one source is compiled anew."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
    (csrc / file).write_text(text.replace(old, new))
    target = folder / "planted.o"
    compile_source(csrc / source, target, csrc)
    others = [path for path_source, path in objects().items() if path_source != ROOT / "csrc" / source]
    return link([*others, target], folder / "program")


def run(program: Path, interleavings: int, stops_at_first: bool = False) -> tuple[int, str]:
    """Exit status (`FOUND`: ThreadSanitizer reported something) and output."""
    without_randomised_addresses = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    layout = map(str, PAGE.layout_values(emulated_operators().cuda_page_layout_names()))
    options = f"history_size=0 exitcode={FOUND} halt_on_error={int(stops_at_first)}"
    command = [*map(str, without_randomised_addresses), str(program), str(interleavings), str(PAGE.page_size), *layout]
    result = subprocess.run(command, capture_output=True, text=True, env={"TSAN_OPTIONS": options})
    return result.returncode, result.stdout + result.stderr
