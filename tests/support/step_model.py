"""What a decode step must take at least, kernel by kernel: bytes over bandwidth, and instructions of the built code.

Instructions are those of the machine code's loops times how often they run; a kernel takes at least what the issue
slots, each kind of arithmetic, or the memory need. What rare paths and the last blocks do is left out.

    python tests/support/step_model.py FOLDER   # of the objects that cuda_build.build leaves
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine_code import Block, blocks_of, disassembled

MULTIPROCESSORS = 132
CLOCK = 1.755e9
"""Hz, of an H100 under load; an H200 has the same multiprocessors."""
COPY_BANDWIDTH = 4.2e12
"""Bytes per second, read and written, as measured on an H200."""
ISSUED = 4.0
"""Instructions of warps per cycle and multiprocessor."""
PER_CYCLE = {
    # NVIDIA's table of arithmetic throughput for compute capability 9.0, over 32: results of a warp per cycle.
    "FFMA FADD FMUL HADD2 HFMA2": 4.0,
    "IMAD IDP": 2.0,
    "IADD3 VIADD LOP3 SHF LEA ISETP FSETP FMNMX VIMNMX SEL FSEL PRMT PLOP3 IABS MOV F2FP I2FP I2F F2I F2F": 2.0,
    "MUFU": 0.5,
    "POPC FLO": 0.5,
    "SHFL": 1.0,
    "LDG STG LDS STS ATOMS ATOMG": 1.0,  # 32 lanes of the load and store units
    "IMMA": 2.0,  # dense products of the data sheet
    "HMMA": 1.0,
}


@dataclass(frozen=True)
class Shape:
    """A batch of equal requests, with the heads of an 8B model and the default settings."""

    length: int = 131072
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    rank: int = 16
    page_size: int = 256
    top_k: int = 2048

    @property
    def pages(self) -> int:
        """Sealed pages of all requests and KV heads."""
        return (self.length - 1) // self.page_size * self.batch * self.kv_heads

    @property
    def tokens(self) -> int:
        return self.pages * self.page_size

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def chunks(self) -> int:
        """Blocks of kernels that work on 4096 tokens each."""
        return -(-self.length // 4096) * self.batch * self.kv_heads

    @property
    def cut_tiles(self) -> float:
        """Share of tiles of 128 tokens of which something is selected, where that is spread evenly."""
        return 1 - (1 - self.top_k / self.length) ** 128


@dataclass(frozen=True)
class Kernel:
    """How often the parts of one kernel run.

    Args:
        source: below csrc/cuda, without its ending.
        entry: of the mangled name.
        warps: that run.
        loops: how often each loop runs, each time that it is reached, in the order of their addresses.
        cold: blocks that do not run but rarely.
        tail: an opcode from which on only the last block of several goes on.
        bytes: that are read and written.
    """

    source: str
    entry: str
    warps: float
    loops: Sequence[float]
    bytes: float
    cold: Callable[[Block], bool] = lambda block: False
    tail: str | None = None


@dataclass(frozen=True)
class Estimate:
    """Microseconds that a kernel takes at least, by each limit."""

    instructions: float
    """Of warps, all together."""
    bytes: float
    issue_us: float
    units_us: float
    """Of the busiest kind of unit."""
    memory_us: float

    @property
    def us(self) -> float:
        return max(self.issue_us, self.units_us, self.memory_us)


def select_kernels(shape: Shape, linear: bool) -> dict[str, Kernel]:
    """Those of a selection with int8 factors."""
    s, chunk_warps = shape, shape.chunks * 8
    deltas, keys, tiles = 2 * s.tokens * s.group, 4 * s.tokens, 2 * s.pages
    factors = s.page_size * s.rank
    warps = -(-(s.pages // s.kv_heads // s.batch + 1) // 16) * 8 * s.batch * s.kv_heads
    kernels = {
        "score": Kernel(
            "lrqk/score_int8",
            "score_int8_kernelILi4ELi1ELi1E",
            warps,
            [s.pages / warps, 2, *[0] * 7],
            s.pages * (factors + s.rank * (s.head_size + 4)) + deltas + 8 * tiles * s.group,
            lambda b: b.count("ISETP") >= 40 or b.count("FSEL") >= 16 or b.count("F2F") >= 8,  # tiles cut by a border
            "MEMBAR",
        ),
        "weigh": Kernel(
            "topk/weigh",
            "weigh_kernel",
            chunk_warps,
            [8, 2, s.group / 2, 8, *[0] * 5],
            deltas + keys + 4 * tiles * s.group,
            lambda b: b.count("FADD") == 17,  # a last head of an odd number
            "MEMBAR",
        ),
        "collect": Kernel("topk/collect", "collect_kernel", chunk_warps, [1, 0, 4, *[0] * 7], keys, tail="MEMBAR"),
        "emit": Kernel(
            "topk/emit",
            "emit_kernel",
            chunk_warps,
            # Lists of one block, chunks without candidates; counts of chunks; of two spans counts and positions; heads
            # of two spans; pages.
            [0, 0, 0, 1, 0, 1, 1.5, 0, 1, 1.5, 1, s.group, s.group, 0.25, 0, 0, 0],
            keys + deltas * s.cut_tiles + s.tokens / 8 + 8 * tiles * s.group + 4 * s.pages * s.group,
            lambda b: b.count("FMNMX") >= 8 or b.count("FADD") >= 15,  # sums made again
        ),
    }
    if linear:
        moments = 4 * s.pages * s.group * s.rank
        kernels["moment"] = Kernel(
            "lrqk/moment_int8",
            "moment_int8_kernelILi4ELi1E",
            s.pages,
            [2],
            s.pages * factors + deltas + s.tokens / 8 + 4 * tiles * s.group + moments,
        )
    return kernels


def instructions_of(kernel: Kernel, code: str) -> dict[str, float]:
    """Instructions of one warp by opcode, without modifiers.

    Raises:
        ValueError: the code has other loops than the kernel is said to have.
    """
    blocks = blocks_of(code)
    heads = sorted({head for block in blocks.values() for head in block.loops})
    if len(heads) != len(kernel.loops):
        raise ValueError(f"{kernel.source} has {len(heads)} loops, {len(kernel.loops)} are described")
    runs = dict(zip(heads, kernel.loops))
    tails = [at for at, block in blocks.items() if kernel.tail and block.count(kernel.tail)]
    end = min(tails, default=1 << 60)
    found: dict[str, float] = {}
    for at, block in blocks.items():
        if at > end or kernel.cold(block) or block.count("CALL"):
            continue
        times = 1.0
        for head in block.loops:
            times *= runs[head]
        for opcode, count in block.counts.items():
            name = opcode.split(".")[0]
            found[name] = found.get(name, 0.0) + times * count
    return found


def estimate(kernel: Kernel, code: str) -> Estimate:
    """The least that a kernel takes."""
    counts = instructions_of(kernel, code)
    to_us = 1e6 * kernel.warps / (MULTIPROCESSORS * CLOCK)
    units = max(sum(counts.get(name, 0.0) for name in names.split()) / rate for names, rate in PER_CYCLE.items())
    total = sum(counts.values())
    return Estimate(
        total * kernel.warps, kernel.bytes, total / ISSUED * to_us, units * to_us, 1e6 * kernel.bytes / COPY_BANDWIDTH
    )


def estimates(objects: dict[str, Path], shape: Shape, linear: bool) -> dict[str, Estimate]:
    """Of the kernels of a selection.

    Args:
        objects: by the source's path, from `csrc/cuda/...` on.
    """
    found = {}
    for name, kernel in select_kernels(shape, linear).items():
        codes = disassembled(objects[f"csrc/cuda/{kernel.source}.cu"])
        (code,) = (text for entry, text in codes.items() if re.search(rf"\d{kernel.entry}", entry))
        found[name] = estimate(kernel, code)
    return found


def main(folder: str) -> None:
    objects = {
        path.name.removesuffix(".o").replace("_", "/", 2): path for path in Path(folder).glob("csrc_cuda_*.cu.o")
    }
    objects = {f"csrc/cuda/{kernel.source}.cu": next(path for path in objects.values()
               if path.name == f"csrc_cuda_{kernel.source.replace('/', '_')}.cu.o")
               for kernel in select_kernels(Shape(), True).values()}  # fmt: skip
    for name, found in estimates(objects, Shape(), True).items():
        print(f"{name:8} {found.bytes / 1e6:6.0f} MB {found.instructions / 1e6:6.1f} M "
              f"issue {found.issue_us:5.1f} units {found.units_us:5.1f} memory {found.memory_us:5.1f} us")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
