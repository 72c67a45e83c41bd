"""Soft caps on attention logits (Gemma 2) and learned sinks (gpt-oss) in real engines: tokens of dense attention."""

from collections.abc import Callable
from typing import Any

import pytest
from comparisons import assert_same
from engines import counters, engine, greedy, tiny_gemma2, tiny_gpt_oss, token_prompts

pytestmark = pytest.mark.engine

LENGTHS = [1, 47, 49, 200, 330, 700]
TOKENS = 40
LAYERS = {"LRQKImpl": 2, "WindowImpl": 2}


@pytest.mark.parametrize("make", [tiny_gemma2, tiny_gpt_oss])
def test_dense_tokens(models: Any, make: Callable[[Any], Any]) -> None:
    """Full-attention layers and those with a window, in chunks, against vLLM's own CPU backend, which serves both."""
    model, prompts = make(models), token_prompts(LENGTHS)
    with engine(model) as llm:
        dense = greedy(llm, prompts, TOKENS, logprobs=5)
    settings = {"has_windows": True, "max_num_batched_tokens": 130, "max_num_seqs": 4}
    with engine(model, {"top_k": 4096, "rank": 8}, **settings) as llm:
        assert_same(dense, greedy(llm, prompts, TOKENS, logprobs=5), "float32", 1e-3)
        counted = counters(llm)
        found = list(counted["implementations"].values())
        assert {name: found.count(name) for name in found} == LAYERS
        assert counted["decode_tokens"] > 0
