"""The page says what is wrong and what to do, and a kernel that computes something else does not pass."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lrqk.core.host_memory import GIB, HostMemory
from vllm_lrqk.devices import cpu, cuda_library
from vllm_lrqk.doctor import command, machine, selftest, software
from vllm_lrqk.doctor.finding import Finding
from vllm_lrqk.integration import compat

SETS = cpu.instruction_sets()


def test_this_machine_serves(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--json"])
    assert ended.value.code == 0
    found = {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"vLLM", "plugin", "CPU kernels", "host memory", "NUMA", "huge pages", "GPU"} <= set(found)
    assert {f"{method} self-test" for method in selftest.LAYERS} <= set(found)
    assert all(finding["status"] != "problem" for finding in found.values())
    assert all(name in found["LRQK self-test"]["text"] for name in SETS)


@pytest.mark.parametrize(
    ("version", "status"), [((0, 31), "problem"), ((0, 32), "fine"), ((0, 99), "note"), (None, "note")]
)
def test_versions(version: Any, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert next(found for found in software.findings() if found.topic == "vLLM").status == status


def test_kernels_that_are_missing_or_do_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    assert software._cpu_kernels().status == "note"
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path)
    monkeypatch.setattr(cpu, "instruction_sets", tuple)
    assert "does not load" in software._cpu_kernels().text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_library, "LIBRARY", tmp_path / "none.so")
    monkeypatch.setattr(cuda_library, "load", cuda_library.load.__wrapped__)
    found = software._cuda_kernels()
    assert found.status == "problem"
    assert "without its CUDA kernels" in found.text
    assert "nvcc" in found.remedy


def test_little_memory_and_no_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: HostMemory(GIB, "the control group /job"))
    found = machine._host_memory()
    assert found.status == "note"
    assert "/job" in found.text
    enabled = tmp_path / "enabled"
    monkeypatch.setattr(machine, "HUGE_PAGES", enabled)
    assert machine._huge_pages().status == "note"
    enabled.write_text("always madvise [never]\n")
    assert machine._huge_pages().text == "never"
    enabled.write_text("always [madvise] never\n")
    assert machine._huge_pages().status == "fine"


def test_what_is_not_fine_says_what_to_do() -> None:
    assert "-> do this" in command.line(Finding("thing", "note", "text", "do this"))
    with pytest.raises(ValueError, match="says what to do"):
        Finding("thing", "problem", "text")


@pytest.mark.skipif(not SETS, reason="CPU kernels are not built")
@pytest.mark.parametrize("fault", ["decode", "nan", "another version"])
def test_a_faulty_kernel_is_found(fault: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A decode kernel that forgets a tenth of the output's size, gives no number, or is of another version."""
    make = selftest.make_lrqk

    def make_faulty(name: str) -> Any:
        layer: Any = make(name)
        if name != "torch":
            decode = layer.decoder.kernels.decode_attention

            def faulty(*arguments: Any) -> Any:
                if fault == "another version":
                    raise RuntimeError("vllm_lrqk::cpu_decode() expected at most 15 argument(s) but received 16")
                rows = decode(*arguments)
                arguments[-1].mul_(0.9 if fault == "decode" else torch.nan)
                return rows

            layer.decoder.kernels = replace(layer.decoder.kernels, decode_attention=faulty)
        return layer

    tokens = selftest.make_tokens()
    assert selftest.check("LRQK", make, SETS[:1], tokens).status == "fine"
    found = selftest.check("LRQK", make_faulty, SETS[:1], tokens)
    assert found.status == "problem"
    monkeypatch.setattr(command, "examine", lambda with_self_test: [found])
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == 1
    assert "PROBLEM" in capsys.readouterr().out


def test_memory_nodes_are_named_with_what_binds_a_gpus_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Host pages lie where the process that registers them may allocate: by default on any node."""
    monkeypatch.setattr(machine, "NODES", tmp_path)
    for nodes, status in ((1, "fine"), (2, "note")):
        (tmp_path / f"node{nodes}").mkdir()
        found = next(found for found in machine.findings() if found.topic == "NUMA")
        assert found.status == status
    assert "--numa-bind" in found.remedy
