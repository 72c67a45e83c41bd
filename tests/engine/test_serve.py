"""`vllm serve` with LRQK, as the README shows it: the example finds its needle over the OpenAI API."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "needle_server.py"


@pytest.mark.engine
def test_the_example_finds_the_needle():
    command = [sys.executable, str(EXAMPLE), "--context", "3000", "--top-k", "128", "--depth", "0.3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.rstrip().endswith("found")
    assert "rows missed, fetched from the host" in result.stdout
    shown = dict(re.findall(r"(vllm:lrqk_\w+)\s+│\s+([\d,]+)", result.stdout))
    assert int(shown["vllm:lrqk_rows_missed_total"].replace(",", "")) > 0
    assert shown["vllm:lrqk_host_pages_in_use"] == "0"
    assert int(shown["vllm:lrqk_host_pages_free"].replace(",", "")) > 0
