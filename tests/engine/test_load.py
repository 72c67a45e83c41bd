"""An answer of default factors depends neither on other requests nor on how its prompt is cut into chunks."""

import pytest
from comparisons import TOKENS, assert_same
from engines import counters, engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine
LENGTHS = [700, 330, 70, 200]
"""Cut anywhere below, no last token is left alone: it would decode, approximately."""


def test_chunks_and_company_change_nothing(models):
    model = tiny_llama(models)
    prompts = token_prompts(LENGTHS, shared=128)
    found = []
    for budget in (2048, 300, 256):
        values = {"top_k": 48, "recent_tokens": 16}
        with engine(model, values, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
            found.append(greedy(llm, prompts, TOKENS, logprobs=5))
            found.append([greedy(llm, [prompt], TOKENS, logprobs=5)[0] for prompt in prompts])
            assert counters(llm)["rows_attended"] < 0.7 * sum(LENGTHS) * 2 * TOKENS * 4
    for other in found[1:]:
        # A key factor between two steps of the stored integers may round either way.
        assert_same(found[0], other, "float32", 0.02)
