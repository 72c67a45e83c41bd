"""The source distribution holds what builds the kernels, and the library suits every Python and later torch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from vllm_lrqk.devices import cpu

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("csrc", "vllm_lrqk", "cuda_build.py", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def files(folder: Path, *parts: str) -> set[str]:
    """Paths below a folder, without what is built or cached."""
    found = (path for part in parts for path in [folder / part, *(folder / part).rglob("*")] if path.is_file())
    left_out = {".so", ".pyc"}
    return {str(path.relative_to(folder)) for path in found if path.suffix not in left_out}


def test_source_distribution(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in files(ROOT, *PARTS):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    environment = {**os.environ, "VLLM_LRQK_SKIP_CUDA": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert files(ROOT, *PARTS) <= inside, sorted(files(ROOT, *PARTS) - inside)


@pytest.mark.skipif(not cpu.LIBRARY.exists() or not shutil.which("nm"), reason="no CPU kernels, or no nm")
def test_the_library_needs_only_torchs_stable_interface() -> None:
    """No symbol of Python and none of torch's C++ classes: one file for every Python and for later torch versions."""
    result = subprocess.run(["nm", "-D", "--undefined-only", cpu.LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in result.stdout.splitlines()]
    foreign = [name for name in symbols if "@" not in name and not name.startswith(("_ITM_", "__gmon", "__cxa"))]
    assert any(name.startswith("aoti_torch_") for name in foreign)
    assert [name for name in foreign if not re.match(r"(aoti_)?torch_", name)] == []
