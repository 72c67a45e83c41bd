"""Reads the machine code of compiled CUDA kernels, with the disassembler that Triton brings along."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import triton


def instructions(compiled: Path) -> dict[str, Counter[str]]:
    """Instructions of each kernel of an object file or cubin, with their modifiers, by the kernel's mangled name."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([program, "-sass", compiled], capture_output=True, text=True, check=True).stdout
    found: dict[str, Counter[str]] = {}
    for part in said.split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        found[name] = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.MULTILINE))
    return found
