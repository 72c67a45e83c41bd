"""What windows take of vLLM's pool of blocks."""

from vllm_lrqk.core.windows import WindowLayers, full_attention_layers, plan_windows, windows_served


def test_blocks_are_not_widened_where_windows_fit() -> None:
    plan = plan_windows(WindowLayers(512, 15, 2048), page_bytes=40_000, page_size=256)
    assert (plan.block_size, plan.groups, plan.block_bytes) == (16, 15, 40_000)


def test_of_block_sizes_that_fit_the_one_with_least_unused() -> None:
    plan = plan_windows(WindowLayers(1024, 52, 8192), page_bytes=1_392_640, page_size=256)
    assert (plan.block_size, plan.groups) == (32, 11)
    assert plan.blocks_of(1024) * plan.block_bytes < 1.17 * 1024 * 52 * 8192


def test_wide_windows_widen_blocks() -> None:
    plan = plan_windows(WindowLayers(128, 3, 4096), page_bytes=1000, page_size=64)
    assert (plan.block_size, plan.groups, plan.block_bytes) == (16, 3, 65_536)


def test_requests_that_a_share_of_the_memory_holds() -> None:
    plan = plan_windows(WindowLayers(512, 15, 2048), page_bytes=40_000, page_size=256)
    one = plan.blocks_for(1, 2048)
    assert windows_served(plan, 1 << 40, 8, 2048) == plan.blocks_for(8, 2048)
    assert windows_served(plan, 1 << 20, 8, 2048) == one
    assert windows_served(plan, 4 * plan.block_bytes * plan.blocks_for(3, 2048), 8, 2048) == plan.blocks_for(3, 2048)


def test_full_attention_layers() -> None:
    assert full_attention_layers(None, 3) == [0, 1, 2]
    assert full_attention_layers(["sliding_attention", "full_attention"], 2) == [1]
