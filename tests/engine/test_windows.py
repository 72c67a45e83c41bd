"""Layers with a sliding window beside full attention, in a real engine: tokens of dense attention."""

from typing import Any

import pytest
from engines import assert_nothing_in_use, counters, engine, greedy, scheduler, tiny_gemma3, token_prompts

pytestmark = pytest.mark.engine

WINDOW = 48
LENGTHS = [1, 2, 47, 48, 49, 64, 200, 330, 700]
TOKENS = 80
COVERING = {"top_k": 4096, "rank": 8}


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_gemma3(models, WINDOW)


def tokens(llm: Any, prompts: list[Any], count: int = TOKENS) -> list[list[int]]:
    return [list(output.token_ids) for output in greedy(llm, prompts, count)]


def window_managers(llm: Any) -> list[Any]:
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    return [manager for manager in managers if type(manager).__name__ == "WindowManager"]


@pytest.fixture(scope="module")
def expected(model: Any) -> tuple[list[Any], list[list[int]]]:
    prompts = token_prompts(LENGTHS, shared=40)
    with engine(model) as llm:
        return prompts, tokens(llm, prompts)


def test_dense_tokens(model: Any, expected: Any) -> None:
    """In batches, with prompts and answers that leave the window, and again from the prefix cache."""
    prompts, dense = expected
    with engine(model, COVERING, has_windows=True) as llm:
        for _ in range(2):
            assert tokens(llm, prompts) == dense
            assert_nothing_in_use(llm)
        counted = counters(llm)
        implementations = list(counted["implementations"].values())
        assert implementations.count("LRQKImpl") == 2
        assert implementations.count("WindowImpl") == 4
        assert counted["host_bytes_per_token"] == 2 * 2 * 2 * 64 * 4  # of the full-attention layers alone
        assert llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.enable_caching


def test_chunks(model: Any, expected: Any) -> None:
    """Chunks shorter and longer than the window, cut anywhere, and windows with few requests' blocks."""
    prompts, dense = expected
    for chunk, more in ((37, {"hot_cache": True}), (130, {})):
        settings = {"max_num_batched_tokens": chunk, "max_num_seqs": 3, "enable_prefix_caching": False}
        with engine(model, COVERING | more, has_windows=True, **settings) as llm:
            assert tokens(llm, prompts) == dense


def test_blocks_leave_the_window(model: Any, expected: Any) -> None:
    """A long request holds as many blocks as a window takes, and none that has a host page."""
    prompts, dense = expected
    with engine(model, COVERING, has_windows=True, max_num_seqs=1) as llm:
        windows = window_managers(llm)
        held: list[int] = []
        for manager in windows:
            allocate = manager.allocate_new_blocks

            def noting(request: str, *rest: Any, manager: Any = manager, allocate: Any = allocate) -> Any:
                new = allocate(request, *rest)
                used = [block.block_id for block in manager.req_to_blocks[request] if not block.is_null]
                assert all(block >= manager.kv_cache_spec.first_block for block in used)
                held.append(len(used))
                return new

            manager.allocate_new_blocks = noting
        assert tokens(llm, prompts[-1:], 300)[0][:TOKENS] == dense[-1]
        size = windows[0].kv_cache_spec.block_size
        assert held[-1] <= -(-WINDOW // size) + 2
        pool = windows[0].block_pool
        assert all(manager.block_pool is pool for manager in windows)
        assert {block.block_id for block in pool.blocks[1:]}.isdisjoint(range(windows[0].kv_cache_spec.first_block))


def test_preemption(model: Any, expected: Any) -> None:
    """Pages for a few of the requests beside all windows: others are sent back and computed again."""
    prompts, dense = expected
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 1024}
    with engine(model, COVERING, has_windows=True, **settings) as llm:
        own = len(window_managers(llm)[0].block_pool.blocks) - 1
    with engine(model, COVERING, has_windows=True, num_gpu_blocks_override=own + 19, **settings) as llm:
        preempted = []
        preempt = scheduler(llm)._preempt_request
        scheduler(llm)._preempt_request = lambda *a, **k: (preempted.append(a[0].request_id), preempt(*a, **k))[1]
        assert tokens(llm, prompts) == dense
        assert preempted


def test_windows_share_the_memory_for_keys_and_values(model: Any, expected: Any) -> None:
    """Where a share of it holds the windows of one request only, requests wait for each other."""
    prompts, dense = expected
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 64}
    with engine(model, COVERING | {"host_memory_gib": 0.0045}, has_windows=True, **settings) as llm:
        assert tokens(llm, prompts) == dense
        pool = window_managers(llm)[0].block_pool
        plan = llm.llm_engine.vllm_config.additional_config.engine.windows.plan
        assert len(pool.blocks) - 1 < plan.blocks_for(3, 128)
