"""How much CPU memory this process may really use: the system's, its control groups', its NUMA nodes'."""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

GIB = 1 << 30
DEFAULT_SHARE = 0.5
"""Of the free memory, for the host tier, where nothing is asked for."""
MAX_SHARE = 0.8
"""Of the free memory, at most: the model and the system need some, and what a GPU reads cannot be swapped out."""
_UNLIMITED = 1 << 60
"""Limits from here on are none: a control group of version 1 says "no limit" by a number near 2**63."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes that this process can take without swapping, and who says so."""

    free_bytes: int
    source: str


def free_host_memory() -> int:
    """Bytes of CPU memory that this process can take without swapping."""
    return host_memory().free_bytes


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The least of what the system, the control groups and the NUMA nodes have.

    vLLM's CPU platform binds memory to nodes strictly, and memory that belongs to no node is out of its reach. The
    page cache counts as free: the system gives it up before it refuses memory.

    Args:
        root: of the file system, for tests.
    """
    found = [HostMemory(psutil.virtual_memory().available, "the system"), *control_groups(root)]
    nodes = _node_memory(root)
    if nodes is not None:
        found.append(HostMemory(nodes, "the NUMA nodes"))
    return min(found, key=lambda memory: memory.free_bytes)


def control_groups(root: Path = Path("/")) -> list[HostMemory]:
    """What each control group with a limit leaves to this process, from its own group up to the outermost."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[HostMemory] = []
    for line in lines:  # "0::/path" in version 2, "4:memory:/path" in version 1
        hierarchy, controllers, path = line.split(":", 2)
        is_unified = hierarchy == "0" and not controllers
        if is_unified or "memory" in controllers.split(","):
            for folder in _group_folders(root, path, is_unified):
                memory = _unified_memory(folder) if is_unified else _version_1_memory(folder)
                if memory is not None:
                    found.append(HostMemory(memory, f"the control group {folder}"))
    return found


def _group_folders(root: Path, path: str, is_unified: bool) -> list[Path]:
    """Folders of a control group and of those around it.

    The path in /proc is relative to the root of the hierarchy, of which a container may see a part as its whole: a
    folder that is not there is left out, and the mount point itself is always looked at.
    """
    mount, mounted = _mount_point(root, is_unified)
    try:
        inside = PurePosixPath(path).relative_to(mounted)
    except ValueError:  # of another part of the hierarchy than the one that is mounted
        inside = PurePosixPath(".")
    folders = [mount / inside, *(mount / parent for parent in inside.parents)]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _mount_point(root: Path, is_unified: bool) -> tuple[Path, str]:
    """Where the hierarchy is mounted, and which part of it."""
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:  # "36 35 0:33 /part /mount/point rw - cgroup2 cgroup2 rw,memory"
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == ("cgroup2" if is_unified else "cgroup") and (is_unified or "memory" in options.split(",")):
            part, point = before.split(" ")[3:5]
            return root / point.lstrip("/"), part
    default = "sys/fs/cgroup" if is_unified else "sys/fs/cgroup/memory"
    return root / default, "/"


def _unified_memory(folder: Path) -> int | None:
    return _left(folder, "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def _version_1_memory(folder: Path) -> int | None:
    cache = ("total_inactive_file", "total_active_file")
    return _left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", cache)


def _left(folder: Path, limit: str, usage: str, reclaimable: tuple[str, ...]) -> int | None:
    try:
        text = (folder / limit).read_text().strip()
        if text == "max" or int(text) >= _UNLIMITED:
            return None
        used = int((folder / usage).read_text())
        entries = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    cache = sum(int(entries.get(name, 0)) for name in reclaimable)
    return max(0, int(text) - max(0, used - cache))


def _node_memory(root: Path) -> int | None:
    reclaimable = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
    total = None
    for meminfo in (root / "sys/devices/system/node").glob("node*/meminfo"):
        # Lines read "Node 0 MemFree:  5164260 kB".
        entries = dict(re.findall(r"Node \d+ ([\w()]+):\s+(\d+) kB", meminfo.read_text()))
        total = (total or 0) + sum(int(entries.get(name, 0)) * 1024 for name in reclaimable)
    return total
