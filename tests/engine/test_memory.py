"""Who gets which block ids when device and host memory do not match."""

import pytest
from engines import assert_nothing_in_use, counters, engine, greedy, scheduler, tiny_llama, token_prompts

pytestmark = pytest.mark.engine

PAGE = 64
SETTINGS = {
    "page_size": PAGE,
    "rank": 8,
    "top_k": 512,
    "recent_tokens": 16,
    "factorization": "key_pca",
    "residual": "mean",
}
# Two layers, two KV heads, head size 64: A, X, scales and mean value of a page in int8, float32 and bfloat16.
FACTOR_BLOCK = 2 * 2 * PAGE * 19
HOST_PAGE = 2 * 2 * PAGE * 2 * 64 * 4


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


@pytest.fixture(scope="module")
def expected(model):
    prompts = token_prompts([300, 100, 280, 40])
    with engine(model) as llm:
        return prompts, [list(output.token_ids) for output in greedy(llm, prompts, 30)]


def managers(llm):
    return {type(m).__name__: m for m in scheduler(llm).kv_cache_manager.coordinator.single_type_managers}


def test_more_device_blocks_than_host_pages(model, expected):
    prompts, dense = expected
    settings = {**SETTINGS, "host_memory_gib": 13 * HOST_PAGE / 2**30}
    with engine(model, settings, kv_cache_memory_bytes=100 * FACTOR_BLOCK, max_model_len=512) as llm:
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert len(pool.blocks) == 100
        assert pool.num_gpu_blocks == 13
        assert pool.get_num_free_blocks() == 12
        assert [list(output.token_ids) for output in greedy(llm, prompts, 30)] == dense
        assert llm.reset_prefix_cache()


def test_blocks_without_a_host_page_hold_hot_rows(model, expected):
    prompts, dense = expected
    settings = {**SETTINGS, "hot_cache": True, "host_memory_gib": 13 * HOST_PAGE / 2**30}
    with engine(model, settings, kv_cache_memory_bytes=2000 * FACTOR_BLOCK, max_model_len=512) as llm:
        hot = managers(llm)["RequestManager"]
        assert hot.spare_pool.get_num_free_blocks() == 2000 - 13
        taken = []
        allocate = hot.allocate_new_blocks
        hot.allocate_new_blocks = lambda *a: taken.extend(blocks := allocate(*a)) or blocks
        assert [list(output.token_ids) for output in greedy(llm, prompts, 30)] == dense
        assert len(taken) >= 4 * hot.blocks_per_request
        assert all(block.block_id >= 13 for block in taken)


def test_hot_rows_and_pages_share_what_is_left(model, expected):
    """More host pages than device blocks: hot rows take ids that pages also use, and inherit their bytes."""
    prompts, dense = expected
    settings = {**SETTINGS, "hot_cache": True, "top_k": 300, "host_memory_gib": 0.5}
    with engine(model, settings, kv_cache_memory_bytes=800 * FACTOR_BLOCK, max_model_len=512) as llm:
        hot = managers(llm)["RequestManager"]
        assert hot.spare_pool.get_num_free_blocks() == 0
        assert 2 * hot.blocks_per_request < 800  # room for several requests at once
        for _ in range(3):
            assert [list(output.token_ids) for output in greedy(llm, prompts, 30)] == dense
            assert_nothing_in_use(llm)
        assert counters(llm)["rows_hit"] > 0
