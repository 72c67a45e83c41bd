"""LoLA's Triton kernels compile for a GPU that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_kernels_compile_for_the_smallest_shared_memory() -> None:
    """99 KiB, of GPUs with capability 8.6 and 8.9."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests/support/lola_compile.py"), "80"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == 2 * 2 * 2
    assert all(item["cubin_bytes"] > 0 and item["shared_bytes"] <= 99 << 10 for item in compiled), compiled
