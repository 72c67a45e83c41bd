"""Where the selection covers everything, LRQK is dense attention: the same tokens as vLLM's own CPU backend."""

import pytest
from comparisons import CASES, PROMPT_LENGTHS, TOKENS, assert_same
from engines import counters, engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_size", "tolerance"), CASES)
def test_equals_dense(models, dtype, heads, kv_heads, head_size, tolerance):
    model = tiny_llama(models, heads, kv_heads, head_size)
    prompts = token_prompts(PROMPT_LENGTHS)
    with engine(model, dtype=dtype) as llm:
        dense = greedy(llm, prompts, TOKENS, logprobs=5)
    for hot_cache in (False, True):
        with engine(model, {"top_k": 4096, "hot_cache": hot_cache}, dtype=dtype) as llm:
            assert_same(dense, greedy(llm, prompts, TOKENS, logprobs=5), dtype, tolerance)
            counted = counters(llm)
        decode_rows = sum(length + i + 1 for length in PROMPT_LENGTHS for i in range(TOKENS - 1))
        decode_rows += PROMPT_LENGTHS.count(1)  # a single token decodes, of a prompt too
        assert counted["rows_attended"] == decode_rows * 2 * kv_heads  # two layers
        assert (counted["rows_hit"] > 0) == hot_cache


def test_equals_dense_compiled(models):
    model = tiny_llama(models)
    prompts = token_prompts(PROMPT_LENGTHS)
    with engine(model) as llm:
        dense = greedy(llm, prompts, TOKENS, logprobs=5)
    with engine(model, {"top_k": 4096}, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode.value != 0
        assert_same(dense, greedy(llm, prompts, TOKENS, logprobs=5), "float32", 1e-3)
        assert counters(llm)["decode_tokens"] > 0
