"""The scripts for a machine with a GPU, as far as they run without one: none may fail by itself on the day."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulated import emulated_operators
from gpu_vllm import environment
from gpu_vllm_stages import compare

ROOT = Path(__file__).resolve().parents[2]
STEPS = "card load select pages decode layer lola memcheck racecheck bench_linear bench_mean".split()


def summary_of(folder: Path, python: str) -> dict[str, int]:
    """Exit status of each step of a dry run."""
    command = [str(ROOT / "scripts/gpu_day.sh"), "--dry-run", str(folder)]
    subprocess.run(command, env=os.environ | {"GPU_PYTHON": python}, capture_output=True, check=True)
    lines = (line.split() for line in (folder / "summary.txt").read_text().splitlines())
    return {words[0]: int(words[2]) for words in lines}


def test_every_step_runs(tmp_path: Path) -> None:
    """Tests are collected, selections of them are not empty, plans are printed, the operators load."""
    emulated_operators()
    assert summary_of(tmp_path, sys.executable) == dict.fromkeys(STEPS, 0)
    assert "tests/gpu/test_gpu_layer.py" in (tmp_path / "layer.log").read_text()
    assert "131072" in (tmp_path / "bench_linear.log").read_text()


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    found = summary_of(tmp_path, "false")
    assert list(found) == STEPS
    assert all(found[name] for name in STEPS if name != "card")


@pytest.mark.engine
def test_vllm_serves_a_stage(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/gpu_vllm.py"), "--cpu", f"--output={tmp_path}", "--stages"]
    result = subprocess.run([*command, "import", "sparse"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    found = json.loads((tmp_path / "vllm.json").read_text())
    assert found["sparse"]["counters"]["decode_tokens"] > 0
    assert all(len(tokens) == 24 for tokens in found["sparse"]["tokens"])


def test_no_sampler_that_is_not_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER", raising=False)
    assert environment(tmp_path, "dense")["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


def answers(tokens: list[int], **logprobs: float) -> dict[str, Any]:
    places = [{str(token): -1.0, **{name[1:]: value for name, value in logprobs.items()}} for token in tokens]
    return {"tokens": [tokens], "logprobs": [places]}


def test_answers_are_compared_up_to_a_near_tie() -> None:
    same = answers([1, 2, 3, 4])
    assert compare(same, same)["compared"] == "4/4"
    near = compare(answers([1, 2, 3, 5], t4=-1.2), answers([1, 2, 3, 4], t5=-1.2))
    assert (near["equal_until"], near["same_tokens"]) == ([3], False)
    with pytest.raises(RuntimeError, match="token 3: 4 became 5"):
        compare(answers([1, 2, 3, 5], t4=-1.2), answers([1, 2, 3, 4], t5=-9.0))
    with pytest.raises(RuntimeError, match="only 1/4 tokens"):
        compare(answers([1, 5, 3, 4], t2=-1.1), answers([1, 2, 3, 4], t5=-1.1))
