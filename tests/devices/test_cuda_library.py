"""What is said of a library of CUDA kernels that is missing or does not load."""

import re
from pathlib import Path

import pytest

from vllm_lrqk.devices import cuda_library


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "_cuda_kernels.so"
    monkeypatch.setattr(cuda_library, "LIBRARY", path)
    monkeypatch.setattr(cuda_library, "load", cuda_library.load.__wrapped__)
    return path


def message_of_load() -> str:
    with pytest.raises(RuntimeError) as error:
        cuda_library.load()
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_missing_library_is_named_with_its_remedy(library: Path) -> None:
    message = message_of_load()
    assert str(library) in message
    assert "VLLM_LRQK_FORCE_CUDA=1" in message


def test_library_that_does_not_load_is_named_with_the_loaders_error(library: Path) -> None:
    library.write_bytes(b"no library at all, only some bytes that no loader takes for one" * 4)
    message = message_of_load()
    assert "do not load" in message
    assert str(library) in message
    assert "invalid ELF header" in message


ROOT = Path(__file__).resolve().parents[2]
BINDINGS = "".join(path.read_text() for path in sorted((ROOT / "csrc/bindings").glob("cuda*.cpp")))
LAUNCHING = [body for body in re.split(r"^(?=\w.*\()", BINDINGS, flags=re.MULTILINE) if "stream_of(stream)" in body]


@pytest.mark.parametrize("body", LAUNCHING, ids=[body.split("(")[0].split()[-1] for body in LAUNCHING])
def test_operators_launch_on_the_device_of_their_tensors(body: str) -> None:
    """And leave the caller's device as it was: a guard is in scope of every launch."""
    launch = body.index("stream_of(stream)")
    assert "const DeviceGuard guard(" in body[:launch]
    assert body.count("check_launch(") == body.count("stream_of(stream)")
