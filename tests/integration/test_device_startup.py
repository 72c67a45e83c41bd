"""What a CUDA device cannot serve ends start-up with one sentence, and what vLLM is told about graphs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.devices import cuda_library
from vllm_lrqk.integration import worker
from vllm_lrqk.integration.backend import backend_class
from vllm_lrqk.integration.metadata import StepBuilder
from vllm_lrqk.integration.request_blocks import RequestTableBuilder
from vllm_lrqk.integration.settings import current_device
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

CONFIG = LRQKSettings()


def check(config: LRQKSettings, head_size: int = 128, tokens: int = 131072) -> None:
    LRQK(config, "cuda").check(ModelFacts("some/model", head_size, 32, 8, tokens, {}))


def vllm_config(device: str) -> Any:
    return SimpleNamespace(device_config=SimpleNamespace(device_type=device))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the CUDA kernels are looked for: nothing is there yet."""
    path = tmp_path / "_cuda_kernels.so"
    monkeypatch.setattr(cuda_library, "LIBRARY", path)
    monkeypatch.setattr(cuda_library, "load", cuda_library.load.__wrapped__)
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_library, "load", lambda: object())


@pytest.mark.parametrize(("head_size", "tokens"), [(64, 2048), (96, 8192), (128, 131072), (256, 1 << 20)])
def test_what_can_be_served_passes(head_size: int, tokens: int, loaded: None) -> None:
    check(CONFIG, head_size, tokens)
    check(replace(CONFIG, hot_cache=True, rank=64), head_size, tokens)


@pytest.mark.parametrize(
    ("settings", "config", "words"),
    [
        ({}, replace(CONFIG, hot_cache=False), ["lrqk.hot_cache", "false", "auto"]),
        ({}, replace(CONFIG, rank=68), ["lrqk.rank", "68", "64"]),
        ({"head_size": 100}, CONFIG, ["head size", "100", "some/model"]),
        ({"head_size": 320}, CONFIG, ["head size", "320", "256"]),
        ({"tokens": 1 << 22}, CONFIG, ["--max-model-len", "4194304", "4194048"]),
    ],
)
def test_one_sentence(settings: dict[str, int], config: LRQKSettings, words: list[str], loaded: None) -> None:
    with pytest.raises(ConfigError) as error:
        check(config, **settings)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert message.endswith(".")
    assert "\n" not in message


def test_missing_kernels(library: Path) -> None:
    with pytest.raises(ConfigError, match="without its CUDA kernels: install it again with nvcc"):
        LRQK(CONFIG, "cuda").check_machine()


def test_kernels_that_do_not_load(library: Path) -> None:
    library.write_bytes(b"no library")
    with pytest.raises(ConfigError, match=r"do not load: install it again .*_cuda_kernels\.so says: .*\.$") as error:
        LRQK(CONFIG, "cuda").check_machine()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("num_gpu_blocks", "pages"), [(None, 2), (50, 50), (500, 100)])
def test_profiling_pins_nothing(monkeypatch: pytest.MonkeyPatch, num_gpu_blocks: int | None, pages: int) -> None:
    """vLLM makes a pool to profile graphs, of its final size if the user sized it, before it says how many blocks."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(worker, "PinnedMemory", lambda host, runtime: pinned.append(host))
    monkeypatch.setattr(worker, "device_address", lambda host, operators: 0)
    monkeypatch.setattr(worker.devices, "cuda_operators", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: None)
    own = worker.Worker.__new__(worker.Worker)
    own.engine = SimpleNamespace(num_host_pages=100)
    own.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=num_gpu_blocks))
    own._plan, own._device, own._pinned = SimpleNamespace(block_size=16), torch.device("cuda"), []
    host = own._host_pages(LayerShape(8, 2, 64, "float16", 1.0), num_blocks=num_gpu_blocks or 500)
    assert host is not None
    assert len(host) == pages
    assert pinned == [host]


@pytest.mark.parametrize("builder", [StepBuilder, RequestTableBuilder])
def test_graph_support(builder: Any) -> None:
    support = builder.get_cudagraph_support(vllm_config("cuda"), None)
    assert support is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert builder.get_cudagraph_support(vllm_config("cpu"), None) is AttentionCGSupport.NEVER


def test_compute_capability() -> None:
    capabilities = {major: SimpleNamespace(major=major) for major in (7, 8, 9, 12)}
    supports = backend_class("LRQK").supports_compute_capability
    assert [major for major, value in capabilities.items() if supports(value)] == [8, 9, 12]
    assert supports(None)  # the CPU platform has none


def test_device_of_the_cpu_platform() -> None:
    assert current_device(vllm_config("cpu")).type == "cpu"


def test_steps_need_the_hosts_lengths_to_be_right() -> None:
    """vLLM asks before it lets the device decide how many tokens a request has."""
    assert not backend_class("LRQK").supports_device_cpu_query_lens_mismatch()
