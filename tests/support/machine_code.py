"""Reads the machine code of compiled CUDA kernels, with the disassembler that Triton brings along."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import triton

ENDS = ("BRA", "EXIT", "BRX", "BRXU", "RET")


@dataclass(eq=False)
class Block:
    """Instructions that run one after the other."""

    counts: Counter[str] = field(default_factory=Counter)
    """By opcode with its modifiers."""
    last: str = ""
    targets: list[int] = field(default_factory=list)
    """Addresses that its last instruction may go to, beside the next one."""
    falls_through: bool = True
    loops: list[int] = field(default_factory=list)
    """Addresses of the loops around it, from the outermost."""

    def count(self, opcode: str) -> int:
        """Instructions of an opcode, whatever their modifiers."""
        return sum(number for name, number in self.counts.items() if name.split(".")[0] == opcode)


def disassembled(compiled: Path) -> dict[str, str]:
    """Machine code of each kernel of an object file or cubin, by the kernel's mangled name."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([program, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    return dict(part.partition("\n")[::2] for part in said.split("Function : ")[1:])


def instructions(compiled: Path) -> dict[str, Counter[str]]:
    """Instructions of each kernel, with their modifiers."""
    return {
        name: sum((block.counts for block in blocks_of(code).values()), Counter())
        for name, code in disassembled(compiled).items()
    }


@cache
def blocks_of(code: str) -> dict[int, Block]:
    """Basic blocks by their address, with the loops around each (only where a way from the entry leads).

    Branches that only threads of a diverged warp take are left out, and so is what they alone lead to.
    """
    line = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)([^;]*);", re.MULTILINE)
    found = [(int(at, 16), guard, opcode, rest) for at, guard, opcode, rest in line.findall(code)]
    starts = {found[0][0]}
    for (_, _, opcode, rest), following in zip(found, [*found[1:], found[-1]]):
        if opcode.split(".")[0] in ENDS:
            starts.add(following[0])
            starts |= {int(target, 16) for target in re.findall(r"\b0x[0-9a-f]+", rest) if opcode.startswith("BRA")}
    blocks: dict[int, Block] = {}
    for at, guard, opcode, rest in found:
        if at in starts:
            blocks[at] = Block()
        block = next(reversed(blocks.values()))
        block.counts[opcode] += 1
        kind = opcode.split(".")[0]
        if kind == "BRA" and ".DIV" not in opcode:
            block.targets = [int(target, 16) for target in re.findall(r"\b0x[0-9a-f]+", rest)]
            block.falls_through = bool(guard) or bool(re.search(r"\bU?P\d", rest))
        elif kind in ("EXIT", "RET"):
            block.falls_through = bool(guard)
    _find_loops(blocks)
    return blocks


def _find_loops(blocks: dict[int, Block]) -> None:
    order = list(blocks)
    successors = {}
    for at, following in zip(order, [*order[1:], None]):
        block = blocks[at]
        successors[at] = [target for target in block.targets if target in blocks]
        if block.falls_through and following is not None:
            successors[at].append(following)
    reached: set[int] = set()
    waiting = [order[0]]
    while waiting:
        at = waiting.pop()
        if at not in reached:
            reached.add(at)
            waiting += successors[at]
    for at in [at for at in order if at not in reached]:
        del blocks[at]
    before: dict[int, list[int]] = {at: [] for at in blocks}
    for at in blocks:
        for target in successors[at]:
            before[target].append(at)
    above = {at: set(blocks) for at in blocks}  # blocks through which every way to one leads
    above[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for at in list(blocks)[1:]:
            new = set.intersection(*(above[other] for other in before[at])) | {at}
            changed, above[at] = changed or new != above[at], new
    for head in blocks:
        waiting = [at for at in before[head] if head in above[at]]
        body = {head} if waiting else set()
        while waiting:
            at = waiting.pop()
            if at not in body:
                body.add(at)
                waiting += before[at]
        for at in body:
            blocks[at].loops.append(head)
    sizes = Counter(head for block in blocks.values() for head in block.loops)
    for block in blocks.values():
        block.loops.sort(key=lambda head: -sizes[head])
