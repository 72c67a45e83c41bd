"""Memory, NUMA nodes, huge pages, limits and GPUs."""

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from vllm_lrqk.core.host_memory import DEFAULT_SHARE, GIB, MAX_SHARE, control_groups, host_memory
from vllm_lrqk.doctor.finding import Finding

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NODES = Path("/sys/devices/system/node")


def findings() -> Iterator[Finding]:
    """Everything about the machine."""
    yield _processors()
    yield _host_memory()
    yield _nodes()
    yield _huge_pages()
    yield from _gpus()


def _processors() -> Finding:
    usable = len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else 0
    return Finding("processors", "fine", f"{usable} of {psutil.cpu_count()} may be used")


def _host_memory() -> Finding:
    found, groups = host_memory(), len(control_groups())
    free = found.free_bytes / GIB
    text = (
        f"{free:.1f} GiB free of {psutil.virtual_memory().total / GIB:.1f} (source: {found.source}; {groups} control "
        f"group{'s' * (groups != 1)} with a limit); host pages take {free * DEFAULT_SHARE:.1f} by default, "
        f"{free * MAX_SHARE:.1f} at most"
    )
    if free < 2:
        return Finding("host memory", "note", text, "end other processes or raise the control group's limit")
    return Finding("host memory", "fine", text)


def _nodes() -> Finding:
    nodes = len(list(NODES.glob("node[0-9]*")))
    if nodes > 1:
        remedy = (
            "on the CPU platform give one rank to each node (--tensor-parallel-size), "
            "on a GPU start vLLM with --numa-bind, or with numactl --membind at the GPU's node"
        )
        return Finding("NUMA", "note", f"{nodes} nodes: rows from another node's memory come slower", remedy)
    return Finding("NUMA", "fine", f"{nodes or 'no'} node{'s' * (nodes != 1)}")


def _huge_pages() -> Finding:
    if not HUGE_PAGES.exists():
        return Finding("huge pages", "note", "this system has none", "use a kernel with transparent huge pages")
    chosen = HUGE_PAGES.read_text().split("[")[-1].split("]")[0]
    if chosen == "never":
        remedy = f"echo madvise > {HUGE_PAGES} (as root): decode steps read rows from all over the host pages"
        return Finding("huge pages", "note", "never", remedy)
    return Finding("huge pages", "fine", chosen)


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and _driver():
            remedy = "install a torch with CUDA, in the version that the driver serves"
            yield Finding("GPU", "problem", f"driver {_driver()}, but torch sees no GPU", remedy)
        else:
            yield Finding("GPU", "fine", "none: vLLM's CPU platform serves")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability "
        text += f"{properties.major}.{properties.minor}, driver {_driver() or 'unknown'}"
        if properties.major < 8:
            yield Finding("GPU", "problem", text, "use a GPU of compute capability 8.0 or later")
        else:
            yield Finding("GPU", "fine", text)
    yield _locked_memory()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.split("\n")[0].strip() if result.returncode == 0 else ""


def _locked_memory() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "fine", "no limit")
    text = f"at most {limit / GIB:.3g} GiB; CUDA registers host pages through its driver, which may not count them"
    if limit < host_memory().free_bytes * DEFAULT_SHARE:
        return Finding("locked memory", "note", text, "raise it (ulimit -l unlimited) if start-up refuses")
    return Finding("locked memory", "fine", text)
