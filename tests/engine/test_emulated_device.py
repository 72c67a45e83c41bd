"""Real engines on the CPU platform that take the CUDA step path: emulated and interpreted kernels, vLLM's own batches.

The same tokens as the plain path shows that steps, block tables, sealing between steps and counters fit vLLM. Graphs,
streams and pinned memory are not there; tests/methods/lrqk/test_capture_safety.py and tests/gpu have those.
"""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_runtime import Runtime
from drafts import NGRAM, KnowingDrafter, acceptance
from emulated import emulated_operators
from engines import counters, engine, greedy, scheduler, tiny_llama, token_prompts
from host_attention import use_host_attention
from interpreted import interpreted_kernels

interpreted_kernels("methods.lrqk.triton_attend")

from vllm_lrqk.devices.pinned import PinnedMemory  # noqa: E402

pytestmark = pytest.mark.engine

PAGE = 16
# Chunks and batches differ between the engines' schedules, hence factors that ignore the queries.
SETTINGS = {"page_size": PAGE, "rank": 8, "top_k": 24, "recent_tokens": 8, "factorization": "key_pca"}
COUNT = 20
LENGTHS = [1, PAGE - 1, PAGE, 3 * PAGE + 1, 75]
BATCHES = {"max_num_seqs": 3, "max_num_batched_tokens": 40, "max_model_len": 256}


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_llama(models, 4, 2, 64)


@pytest.fixture(scope="module")
def plain(model: Any) -> Iterator[Any]:
    """Tokens of the plain path, and what it counted."""
    with engine(model, SETTINGS | {"hot_cache": True}, **BATCHES) as llm:
        outputs = greedy(llm, token_prompts(LENGTHS), COUNT)
        yield [list(output.token_ids) for output in outputs], counters(llm)


@pytest.fixture
def on_emulated_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_lrqk import devices

    operators = emulated_operators()
    monkeypatch.setattr(devices, "cuda_operators", lambda device: operators)
    use_host_attention(monkeypatch)


def backends_of(llm: Any) -> list[Any]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if hasattr(layer, "impl")]


def test_same_tokens_and_counts(model: Any, plain: Any, on_emulated_device: None) -> None:
    expected, counted = plain
    with engine(model, SETTINGS | {"hot_cache": True}, **BATCHES) as llm:
        from vllm_lrqk.methods.lrqk.cuda_decoder import CudaDecoder

        backends = backends_of(llm)
        decoders = [backend.layer.decoder for backend in backends]
        assert len(decoders) == 2
        assert all(isinstance(decoder, CudaDecoder) for decoder in decoders)
        assert decoders[0].path is decoders[1].path
        pinned = Runtime()
        backends[0].worker._pinned.append(PinnedMemory(torch.zeros(100), pinned))
        outputs = greedy(llm, token_prompts(LENGTHS), COUNT)
        assert [list(output.token_ids) for output in outputs] == expected
        own = counters(llm)
        # One page at most per request and layer waits for a step that never comes.
        assert 0 <= counted["pages_sealed"] - own["pages_sealed"] <= 2 * len(LENGTHS)
        assert own["rows_hit"] > 0
        assert own["rows_missed"] > 0
        assert own["bytes_fetched"] == own["rows_missed"] * 2 * 64 * 4
        assert scheduler(llm).kv_cache_manager.usage == 0
        assert pinned.registered
    assert not pinned.registered  # the worker's shutdown
    assert all(backend.layer is None for backend in backends)


def test_preempted_and_cached_pages(model: Any, on_emulated_device: None) -> None:
    """Too few host pages for all requests: some are preempted, and their pages and hot blocks go to others.

    The selection covers everything, since recomputed tokens are attended exactly.
    """
    settings = SETTINGS | {"hot_cache": True, "top_k": 100, "host_memory_gib": 10 * PAGE * 2048 / 2**30}
    prompts = token_prompts([50, 60, 40], shared=32)
    with engine(model, None, max_model_len=112) as llm:
        expected = [list(output.token_ids) for output in greedy(llm, prompts, 24)]
    with engine(model, settings, max_model_len=112, max_num_seqs=3) as llm:
        preempted = []
        preempt = scheduler(llm)._preempt_request

        def count(*args: Any, **kwargs: Any) -> Any:
            preempted.append(args[0])
            return preempt(*args, **kwargs)

        scheduler(llm)._preempt_request = count
        assert [list(output.token_ids) for output in greedy(llm, prompts, 24)] == expected
        assert preempted
        backends = backends_of(llm)
        for backend in backends:  # as vLLM does when it loads other weights
            before = backend.layer, backend.workspace
            backend.process_weights_after_loading(torch.float32)
            assert all(a is b for a, b in zip(before, (backend.layer, backend.workspace)))
        assert list(greedy(llm, prompts[1:2], 6)[0].token_ids) == expected[1][:6]  # with a cached prefix
        tensors = [(backend.layer.factors.raw, backend.layer.decoder.hot.raw) for backend in backends]
        memory = [weakref.ref(tensor) for pair in tensors for tensor in pair]
        del tensors, before, backend
    gc.collect()
    assert not any(reference() is not None for reference in memory)  # vLLM's blocks go with the shutdown
    assert all(backend._companion.kv_cache.numel() == 0 for backend in backends)


def test_drafted_tokens(model: Any, plain: Any, on_emulated_device: None) -> None:
    """Tokens of one request go through its hot rows in turn; those of rejected tokens are not read again."""
    speculating = {"speculative_config": NGRAM, "disable_log_stats": False}
    with engine(model, SETTINGS | {"hot_cache": True}, **BATCHES, **speculating) as llm:
        prompts, drafter = token_prompts(LENGTHS), KnowingDrafter(llm)
        for prompt, answer in zip(prompts, plain[0]):
            drafter.know(prompt, answer)
        assert [list(output.token_ids) for output in greedy(llm, prompts, COUNT)] == plain[0]
        drafted, accepted = acceptance(llm)
        assert 0.2 * drafted < accepted < 0.9 * drafted
