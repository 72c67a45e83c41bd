"""Whose limit counts: nested control groups of both versions, the page cache, containers that see a part."""

from pathlib import Path

import pytest

from vllm_lrqk.core.host_memory import control_groups, host_memory

GIB = 1 << 30
UNIFIED = "30 23 0:26 {part} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
VERSION_1 = "36 35 0:31 {part} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def process(root: Path, group: str, mount: str) -> None:
    write(root, "proc/self/cgroup", group)
    write(root, "proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mount)


def unified_group(root: Path, path: str, limit: float | None, used: float, cache: float = 0.0) -> None:
    folder = f"sys/fs/cgroup/{path}"
    write(root, f"{folder}/memory.max", "max\n" if limit is None else f"{int(limit * GIB)}\n")
    write(root, f"{folder}/memory.current", f"{int(used * GIB)}\n")
    half = int(cache * GIB) // 2
    write(root, f"{folder}/memory.stat", f"anon 5\nfile 7\ninactive_file {half}\nactive_file {half}\n")


def old_group(root: Path, path: str, limit: float, used: float, cache: float = 0.0) -> None:
    folder = f"sys/fs/cgroup/memory/{path}"
    write(root, f"{folder}/memory.limit_in_bytes", f"{int(limit * GIB)}\n")
    write(root, f"{folder}/memory.usage_in_bytes", f"{int(used * GIB)}\n")
    stat = f"cache 1\ntotal_inactive_file {int(cache * GIB)}\ntotal_active_file 0\n"
    write(root, f"{folder}/memory.stat", stat)


def least(root: Path) -> float:
    return min(memory.free_bytes for memory in control_groups(root)) / GIB


def test_a_slice_around_the_own_group_limits(tmp_path: Path) -> None:
    process(tmp_path, "0::/user.slice/job.slice/run.scope\n", UNIFIED.format(part="/"))
    unified_group(tmp_path, "user.slice/job.slice/run.scope", None, 1)
    unified_group(tmp_path, "user.slice/job.slice", 8, 3)
    unified_group(tmp_path, "user.slice", 64, 10)
    assert least(tmp_path) == 5
    assert min(control_groups(tmp_path), key=lambda found: found.free_bytes).source.endswith("user.slice/job.slice")


def test_the_page_cache_counts_as_free(tmp_path: Path) -> None:
    process(tmp_path, "0::/job\n", UNIFIED.format(part="/"))
    unified_group(tmp_path, "job", 8, 7.5, cache=6)
    assert least(tmp_path) == 6.5


@pytest.mark.parametrize("cache", [0.0, 2.0])
def test_version_1(tmp_path: Path, cache: float) -> None:
    process(tmp_path, "5:cpu,cpuacct:/\n4:memory:/slurm/job_7/step_0\n0::/\n", VERSION_1.format(part="/"))
    old_group(tmp_path, "slurm/job_7/step_0", 2**33, 3, cache)  # no limit of its own
    old_group(tmp_path, "slurm/job_7", 6, 3, cache)
    assert least(tmp_path) == 3 + cache


def test_a_container_sees_a_part_of_the_hierarchy_as_its_whole(tmp_path: Path) -> None:
    process(tmp_path, "4:memory:/docker/abc\n", VERSION_1.format(part="/docker/abc"))
    old_group(tmp_path, ".", 4, 1)
    assert least(tmp_path) == 3


def test_a_path_outside_of_what_is_mounted_is_the_mounted_root(tmp_path: Path) -> None:
    process(tmp_path, "0::/../../other\n", UNIFIED.format(part="/"))
    unified_group(tmp_path, ".", 4, 1)
    assert least(tmp_path) == 3


def test_no_control_groups(tmp_path: Path) -> None:
    assert control_groups(tmp_path) == []
    process(tmp_path, "0::/\n", "")
    assert control_groups(tmp_path) == []


def test_the_least_counts_and_says_who_it_is(tmp_path: Path) -> None:
    process(tmp_path, "0::/job\n", UNIFIED.format(part="/"))
    unified_group(tmp_path, "job", 1, 0.75)
    meminfo = "Node 0 MemFree: 1024 kB\nNode 0 Active(file): 1024 kB\nNode 0 Active(anon): 999999 kB\n"
    write(tmp_path, "sys/devices/system/node/node0/meminfo", meminfo)
    assert host_memory(tmp_path).free_bytes == 2 << 20
    assert host_memory(tmp_path).source == "the NUMA nodes"
    write(tmp_path, "sys/devices/system/node/node0/meminfo", "Node 0 MemFree: 99999999 kB\n")
    assert host_memory(tmp_path).free_bytes == GIB // 4
    assert "job" in host_memory(tmp_path).source


def test_this_machine() -> None:
    found = host_memory()
    assert 0 < found.free_bytes < 1 << 60
    assert found.source
