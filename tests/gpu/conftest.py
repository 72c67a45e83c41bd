"""Tests on a CUDA device. They import neither vLLM nor anything that does."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vllm_lrqk.devices import cuda_library
from vllm_lrqk.devices.pinned import PinnedMemory, device_address


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def operators() -> Any:
    """The compiled operators; a machine with a GPU but without them fails instead of skipping."""
    return cuda_library.load()


@pytest.fixture
def pin(operators: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Makes a CPU tensor readable for the device until the test ends."""
    pinned: list[PinnedMemory] = []

    def register(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(PinnedMemory(tensor, torch.cuda.cudart(), chunk_bytes=1 << 20))
        device_address(tensor, operators)
        return tensor

    yield register
    torch.cuda.synchronize()
    for memory in pinned:
        assert memory.release()


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    """A wait for the device ends the test."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
