"""What the memory of a process is made of, read from Linux' list of its mappings."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ARENA_BYTES = 64 << 20
"""Of a heap of the C library's allocator beside the main one, and what it is aligned to."""
_RANGE = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)$")


@dataclass
class Mapping:
    """One range of addresses.

    Args:
        name: file, or Linux' name such as "[heap]"; empty for anonymous memory.
        pss: bytes in memory, divided by the number of processes that share them.
    """

    start: int
    end: int
    name: str
    pss: int = 0

    @property
    def kind(self) -> str:
        """What it is likely to be."""
        if self.name.startswith(("[heap]", "[stack")):
            return self.name.strip("[]")
        if self.name.startswith(("/dev/shm", "/dev/zero", "/memfd", "/SYSV")):
            return "shared memory"
        if self.name.startswith("/"):
            return "files"
        if self.name:
            return "other"
        is_arena = self.start % ARENA_BYTES == 0 and self.end - self.start <= ARENA_BYTES
        return "arenas" if is_arena else "anonymous"


def mappings(lines: Iterable[str]) -> list[Mapping]:
    """Those of the lines of `/proc/PID/smaps`."""
    found: list[Mapping] = []
    for line in lines:
        head = _RANGE.match(line)
        if head is not None:
            found.append(Mapping(int(head[1], 16), int(head[2], 16), head[4].strip()))
        elif line.startswith("Pss:"):
            found[-1].pss = int(line.split()[1]) << 10
    return found


def by_kind(found: Iterable[Mapping]) -> dict[str, int]:
    """Bytes in memory of every kind."""
    total: dict[str, int] = {}
    for mapping in found:
        total[mapping.kind] = total.get(mapping.kind, 0) + mapping.pss
    return total


def of_process(pid: int) -> list[Mapping]:
    """Mappings of a process.

    Raises:
        OSError: it has gone, or belongs to someone else.
    """
    return mappings(Path(f"/proc/{pid}/smaps").read_text().splitlines())
