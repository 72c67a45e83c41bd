"""Prompts, models and types over which a method that attends everything must equal vLLM's own CPU backend."""

PROMPT_LENGTHS = [1, 2, 63, 64, 65, 200, 321]
TOKENS = 24
# (dtype, query heads, KV heads, head size, largest difference of a log-probability). In bfloat16 either
# backend's log-probabilities differ from those in float32 by up to 0.33 on these models, mean 0.07; two of them may
# differ by the sum of their errors, and in float16 by an eighth of that. There a near tie can end the
# comparison of a prompt early, and which ones do depends on the processor: where vLLM multiplies bfloat16 in tiles
# (AMX), two logits are exactly equal in other places. Between 0.4 and 1.0 of the tokens were compared.
CASES = [
    ("float32", 2, 2, 64, 1e-3),
    ("bfloat16", 8, 2, 128, 0.5),
    ("float16", 7, 1, 96, 0.06),
    ("bfloat16", 8, 1, 64, 0.5),
    ("float32", 8, 2, 128, 1e-3),
]


def assert_same(dense, ours, dtype, tolerance):
    """The same tokens and log-probabilities, up to the first place where rounding could have decided."""
    compared = 0
    for a, b in zip(dense, ours):
        for token_a, token_b, top_a, top_b in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs):
            if token_a != token_b:
                gap = top_a[token_a].logprob - top_a[token_b].logprob if token_b in top_a else float("inf")
                assert gap <= 2 * tolerance, (token_a, token_b, gap)
                break
            assert abs(top_a[token_a].logprob - top_b[token_b].logprob) <= tolerance
            compared += 1
    # A model whose tokens were decided by rounding would let the test pass without comparing anything.
    assert compared >= (1.0 if dtype == "float32" else 0.25) * sum(len(a.token_ids) for a in dense)
