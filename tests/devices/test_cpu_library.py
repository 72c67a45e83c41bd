"""What the start-up line and the log say of the compiled CPU library."""

import subprocess
import sys

import pytest

from vllm_lrqk.devices import cpu


@pytest.mark.parametrize(
    ("head_size", "served"),
    [(128, "cpu-avx512"), (96, "cpu-avx512"), (80, "cpu-avx2"), (40, "cpu-portable"), (36, "torch")],
)
def test_kernels_are_named_by_head_size(head_size: int, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_sets", lambda: cpu.INSTRUCTION_SETS)
    assert cpu.name_for("cpu-avx512", head_size) == served
    hint = cpu.hint_for("cpu-avx512", served, head_size)
    assert bool(hint) == (served != "cpu-avx512")
    assert not hint or str(head_size) in hint


@pytest.mark.parametrize(("content", "words"), [(None, "were not built"), (b"no library", "do not load")])
def test_a_library_that_is_missing_or_broken_is_said_at_vllms_level(tmp_path, content, words) -> None:
    """In a process of its own, in which nothing but vLLM sets up logging."""
    library = tmp_path / "kernels.so"
    if content is not None:
        library.write_bytes(content)
    code = (
        "import vllm.logger, pathlib; from vllm_lrqk.devices import cpu; from vllm_lrqk.methods.lrqk import dispatch; "
        f"cpu.LIBRARY = pathlib.Path({str(library)!r}); print(dispatch.host_kernels().name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "torch"
    assert words in done.stdout + done.stderr
    assert "using the plain torch forms" in done.stdout + done.stderr
