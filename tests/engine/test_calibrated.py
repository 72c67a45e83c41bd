"""LRQK with calibrated factors in real engines."""

import pytest
from calibrations import calibration_of
from comparisons import PROMPT_LENGTHS, TOKENS, assert_same
from engines import counters, engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine
LENGTHS = [300, 330, 70, 200]
"""In pieces of 64 tokens, or after a prefix hit, no last token is left alone: it would decode, approximately."""
SPARSE = {"top_k": 48, "recent_tokens": 16, "rank": 16, "factorization": "calibrated"}


@pytest.mark.parametrize("hot_cache", [False, True])
def test_where_everything_is_selected_it_is_dense(models, hot_cache):
    model = tiny_llama(models)
    values = {"top_k": 4096, "factorization": "calibrated", "calibration": calibration_of(model)}
    prompts = token_prompts(PROMPT_LENGTHS)
    with engine(model) as llm:
        dense = greedy(llm, prompts, TOKENS, logprobs=5)
    with engine(model, values | {"hot_cache": hot_cache}) as llm:
        assert_same(dense, greedy(llm, prompts, TOKENS, logprobs=5), "float32", 1e-3)
        assert counters(llm)["decode_tokens"] > 0


@pytest.mark.parametrize("value_map", ["page", "calibrated"])
def test_chunks_company_and_prefix_hits_change_nothing(models, value_map):
    model = tiny_llama(models)
    values = SPARSE | {"calibration": calibration_of(model), "value_map": value_map}
    prompts = token_prompts(LENGTHS, shared=128)
    found = []
    for settings in ({"max_num_batched_tokens": 2048}, {"max_num_batched_tokens": 64, "max_num_seqs": 1}):
        with engine(model, values, **settings) as llm:
            found.append(greedy(llm, prompts, TOKENS, logprobs=5))
            found.append([greedy(llm, [prompt], TOKENS, logprobs=5)[0] for prompt in prompts])  # cached prefixes
    for other in found[1:]:
        # A key whose coordinate lies between two steps of the stored integers may round either way.
        assert_same(found[0], other, "float32", 0.02)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"lrqk\.calibration is null, but a calibration file of .* is needed"),
        (
            {"page_size": 128},
            r"made for pages of 64 tokens, but lrqk\.page_size is 128: make one with vllm-lrqk cal",
        ),
        ({"rank": 12}, "lrqk.rank is 12, but must be a multiple of 8"),
        (
            {"rank": 40},
            r"lrqk\.rank is 40, but calibrated factors have twice as many columns, and the head size of ",
        ),
        ({"factor_dtype": "bfloat16"}, 'lrqk.factor_dtype is .bfloat16., but factorization "calibrated" has its own'),
    ],
)
def test_refusals(models, values, message):
    model = tiny_llama(models)
    calibration = {"calibration": calibration_of(model)} if values else {}
    with pytest.raises(Exception, match=message), engine(model, SPARSE | calibration | values):
        pass
