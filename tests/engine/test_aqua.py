"""AQUA in real engines: with every dimension it is dense attention; what it approximates depends on nothing else."""

import pytest
from calibrations import calibration_of
from comparisons import CASES, PROMPT_LENGTHS, TOKENS, assert_same
from engines import MIB, counters, engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine
LENGTHS = [300, 330, 70, 200]
"""In pieces of 64 tokens, or after a prefix hit, no last token is left alone: it would decode, approximately."""
POOL = {"kv_cache_memory_bytes": 64 * MIB}


@pytest.mark.parametrize(("dtype", "heads", "kv_heads", "head_size", "tolerance"), CASES)
def test_with_every_dimension_it_is_dense(models, dtype, heads, kv_heads, head_size, tolerance):
    model = tiny_llama(models, heads, kv_heads, head_size)
    values = {"calibration": calibration_of(model), "keep": 1.0, "block_size": 64}
    prompts = token_prompts(PROMPT_LENGTHS)
    with engine(model, dtype=dtype) as llm:
        dense = greedy(llm, prompts, TOKENS, logprobs=5)
    with engine(model, values, "AQUA", dtype=dtype, **POOL) as llm:
        assert_same(dense, greedy(llm, prompts, TOKENS, logprobs=5), dtype, tolerance)
        counted = counters(llm)
    assert counted["decode_tokens"] > 0
    assert counted["device_bytes_per_token"] == 2 * kv_heads * 2 * head_size * (4 if dtype == "float32" else 2)


@pytest.mark.parametrize("values", [{"keep": 0.5}, {"keep": 0.75, "stored": 0.75}, {"key_dtype": "int8", "keep": 1.0}])
def test_chunks_company_and_prefix_hits_change_nothing(models, values):
    """What a block holds is a function of its tokens, and what a step reads is a function of its request."""
    model = tiny_llama(models)
    values = {"calibration": calibration_of(model), "block_size": 32, **values}
    prompts = token_prompts(LENGTHS, shared=128)
    found = []
    for settings in ({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 64, "max_num_seqs": 1}):
        with engine(model, values, "AQUA", **POOL, **settings) as llm:
            found.append(greedy(llm, prompts, TOKENS, logprobs=5))
            found.append([greedy(llm, [prompt], TOKENS, logprobs=5)[0] for prompt in prompts])  # cached prefixes
    for other in found[1:]:
        # Hidden states differ in their last bits, and keys between two steps of int8 then round either way.
        assert_same(found[0], other, "float32", 0.02)


def test_prefill_is_exact_and_decode_is_not(models):
    """Keys of a random model are alike in all directions: a share of the dimensions is far from dense there."""
    model = tiny_llama(models)
    prompts = token_prompts([300, 200], seed=1)
    with engine(model) as llm:
        dense = greedy(llm, prompts, 8, logprobs=5)
    with engine(model, {"calibration": calibration_of(model), "keep": 0.75}, "AQUA", **POOL) as llm:
        ours = greedy(llm, prompts, 8, logprobs=5)
    for a, b in zip(dense, ours):
        assert a.token_ids[0] == b.token_ids[0]
        assert abs(a.logprobs[0][a.token_ids[0]].logprob - b.logprobs[0][b.token_ids[0]].logprob) < 1e-3
        assert a.token_ids != b.token_ids


def test_without_a_calibration_it_says_how_to_get_one(models):
    model = tiny_llama(models)
    message = r"aqua\.calibration is null, but a calibration file of .* is needed"
    with pytest.raises(Exception, match=message), engine(model, {}, "AQUA", **POOL):
        pass


def test_a_calibration_of_another_model_is_refused(models):
    model, other = tiny_llama(models), tiny_llama(models, 8, 1, 64)
    values = {"calibration": calibration_of(other)}
    message = "of 8 query and 1 KV heads of size 64, but .* has 2 layers of 8 query and 2 KV heads"
    with pytest.raises(Exception, match=message), engine(model, values, "AQUA", **POOL):
        pass
