"""The figure that README and the picture of the tiers lead with is what the byte formats say."""

from pathlib import Path

import pytest
import torch

from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.methods.lrqk.format import PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

ROOT = Path(__file__).resolve().parents[2]
LAYERS, KV_HEADS, HEAD_SIZE, TOKENS = 32, 8, 128, 131_072
GIB = 1 << 30


@pytest.mark.parametrize("name", ["README.md", "docs/tiers.svg"])
def test_bytes_of_an_8b_model_at_128k_tokens(name):
    config = LRQKSettings()
    page = PageFormat.from_config(config, HEAD_SIZE)
    hot = HotFormat(page.page_bytes, HEAD_SIZE, torch.bfloat16)
    heads = LAYERS * KV_HEADS
    dense = heads * TOKENS * 2 * HEAD_SIZE * torch.bfloat16.itemsize / GIB
    factors = heads * TOKENS // page.page_size * page.page_bytes / GIB
    rows = heads * hot.blocks_for(config.num_hot_rows) * page.page_bytes / GIB
    text = (ROOT / name).read_text()
    for figure in (
        f"{dense:.0f} GiB",
        f"{factors:.2f} GiB",
        f"{rows:.2f} GiB",
        f"{page.bytes_per_token} bytes per token",
    ):
        assert figure in text
