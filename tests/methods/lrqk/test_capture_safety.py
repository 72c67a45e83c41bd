"""A decode step can be captured: it never waits, never allocates, and launches the same whatever the batch holds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated import emulated_operators
from interpreted import interpreted_kernels
from no_waits import Recorded, RecordedKernel, Waited, no_waits

interpreted_kernels("methods.lrqk.triton_attend")
from host_attention import use_host_attention  # noqa: E402
from served_layers import ServedLayers  # noqa: E402

from vllm_lrqk.core.counters import Counters  # noqa: E402
from vllm_lrqk.core.step import FilledPages, Step, filled_pages  # noqa: E402
from vllm_lrqk.devices import triton_parts  # noqa: E402
from vllm_lrqk.methods.lrqk import triton_attend  # noqa: E402
from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

CONFIG = LRQKSettings(rank=4, page_size=16, top_k=12, recent_tokens=3, sink_tokens=2)

WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda lens: lens.max().item(),
    "tolist": lambda lens: lens.tolist(),
    "int": lambda lens: int(lens[0]),
    "bool": lambda lens: bool((lens > 0).any()),
    "nonzero": lambda lens: lens.nonzero(),
    "mask": lambda lens: lens[lens > 0],
    "masked assignment": lambda lens: lens.clone().__setitem__(lens > 0, 1),
    "unique": lambda lens: lens.unique(),
    "cpu": lambda lens: lens.cpu(),
    "to": lambda lens: lens.to("cpu"),
    "repeat_interleave": lambda lens: torch.repeat_interleave(lens),
    "equal": lambda lens: torch.equal(lens, lens),
}


@pytest.fixture(params=["linear", "mean"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ServedLayers:
    use_host_attention(monkeypatch)
    return ServedLayers(emulated_operators(), replace(CONFIG, residual=request.param), torch.device("cpu"))


@pytest.fixture
def launches(layers: ServedLayers, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the layer launches from now on; nothing runs."""
    recorded = Recorded(layers.path.workspace.operators)
    layers.path.workspace.operators = layers.hot.operators = recorded
    for module, name in ((triton_attend, "_attend_kernel"), (triton_parts, "_combine_kernel")):
        monkeypatch.setattr(module, name, RecordedKernel(name, recorded.calls))
    return recorded.calls


def step_of(layers: ServedLayers, lengths: list[int]) -> Step:
    batch = []
    for length in lengths:
        request = layers.admit()
        request.pages, request.length = list(range(1, 2 + length // 16)), length
        batch.append((request, 1))
    return layers.prepare(batch)


def test_a_step_neither_waits_nor_allocates(layers: ServedLayers, launches: list[tuple[Any, ...]]) -> None:
    captured = layers.capture(4)
    step_of(layers, [33, 16])
    with no_waits(may_allocate=False):
        layers.replay(captured)
    names = [call[0] for call in launches]
    beside = ["_attend_kernel", "cuda_resolve", "cuda_fetch"]  # the residual, which waits for no row
    assert names == ["cuda_append", "cuda_select", *beside, *["_attend_kernel"] * 2, "_combine_kernel"]


def test_launches_do_not_depend_on_the_batch(layers: ServedLayers, launches: list[tuple[Any, ...]]) -> None:
    """A graph repeats the launches of its capture, so those of any other batch must be the same."""
    captured = layers.capture(4)
    layers.replay(captured)
    at_capture = list(launches)
    launches.clear()
    step_of(layers, [1, 47, 90])
    layers.replay(captured)
    assert launches == at_capture
    launches.clear()
    layers.replay(layers.capture(3))
    assert launches != at_capture


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_wait_in_the_step_is_found(
    layers: ServedLayers,
    launches: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    wait: Callable[[torch.Tensor], Any],
) -> None:
    attend = DecodePath.attend

    def waits(self: DecodePath, *args: Any) -> Any:
        wait(args[8])
        return attend(self, *args)

    monkeypatch.setattr(DecodePath, "attend", waits)
    captured = layers.capture(4)
    assert captured.seq_lens.shape == (4,)
    with pytest.raises(Waited), no_waits(may_allocate=True):
        layers.replay(captured)


def test_an_allocation_in_the_step_is_found(
    layers: ServedLayers, launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodePath, "attend", lambda self, *args: torch.empty(args[0].shape))
    with pytest.raises(Waited, match="allocates"), no_waits(may_allocate=False):
        layers.replay(layers.capture(4))


def test_what_happens_between_steps_does_not_wait(layers: ServedLayers) -> None:
    """Finding and sealing filled pages, prefill with sealing, and copying the counters."""
    request = layers.admit()
    layers.run([(request, 31)])
    step = layers.prepare([(request, 1)])
    layers.replay(step)
    counters = Counters(("rows_hit", "rows_missed"), 1, torch.device("cpu"))
    with no_waits(may_allocate=True):
        filled = filled_pages(step)
        layers.seal(layers.capture(1))
        counters.start_copy(torch.tensor(7))
    assert filled is not None
    assert filled.pages.tolist() == request.pages[1:]
    assert filled.numbers.tolist() == [1]
    assert layers.layer.counters.pages_sealed == 2
    prompts = layers.prepare([(layers.admit(), 40), (layers.admit(), 5), (layers.admit(), 16)])
    with no_waits(may_allocate=True):
        layers.replay(prompts)
    assert layers.layer.counters.pages_sealed == 5


def test_sealing_by_eigenvectors_waits() -> None:
    """The exception that docs/cuda.md names: torch looks whether the eigenvectors converged."""
    layers = ServedLayers(emulated_operators(), replace(CONFIG, factorization="key_pca"), torch.device("cpu"))
    layers.layer.host[1] = 1.0
    with pytest.raises(Waited, match="eigh"), no_waits(may_allocate=True):
        layers.layer.seal(FilledPages(torch.tensor([1]), torch.tensor([0])))


def test_counts_arrive_once() -> None:
    counters = Counters(("rows_hit", "rows_missed"), 2, torch.device("cpu"))
    assert counters.arrived() is None
    counters.tallies += torch.tensor([[1, 2], [30, 40]])
    counters.start_copy(torch.tensor(7))
    assert counters.is_copying
    assert counters.arrived() == ({"decode_tokens": 0, "pages_sealed": 0, "rows_hit": 31, "rows_missed": 42}, 7)
    assert counters.arrived() is None
    assert counters.wait() == {"decode_tokens": 0, "pages_sealed": 0, "rows_hit": 31, "rows_missed": 42}
