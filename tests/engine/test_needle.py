"""One token in 32K has to be found: five needles in one haystack, asked for one by one."""

import pytest
from engines import counters, engine, greedy
from needle_model import build, haystack, question

pytestmark = pytest.mark.engine

CONTEXT = 32768
DEPTHS = [0.01, 0.25, 0.5, 0.75, 0.99]
TOP_K = 512


def ask(llm, text, needles):
    from needle_model import vocabulary
    from vllm import TokensPrompt

    ids = {word: i for i, word in enumerate(vocabulary())}
    answers = []
    for needle in needles:
        prompt, right = question(text, needle)
        tokens = [ids[word] for word in prompt.split()]
        expected = [ids[word] for word in right.split()]
        # One request after the other: all but the first find the haystack in the prefix cache.
        output = greedy(llm, [TokensPrompt(prompt_token_ids=tokens)], len(expected))[0]
        answers.append(list(output.token_ids) == expected)
    return answers


def test_finds_every_needle(needle_folder):
    text = haystack(CONTEXT - 16, DEPTHS)
    settings = {"top_k": TOP_K, "rank": 16, "page_size": 256, "hot_cache": True, "host_memory_gib": 1.0}
    with engine(needle_folder, settings, dtype="bfloat16", max_model_len=CONTEXT) as llm:
        assert ask(llm, text, range(5)) == [True] * 5
        counted = counters(llm)
    steps = counted["decode_tokens"]
    # The answers came from a few hundred rows, not from attending to everything.
    assert counted["rows_attended"] <= steps * (TOP_K + 256 + 64 + 4)
    assert counted["rows_hit"] > 0
    assert counted["rows_missed"] > 0
    # The first request seals the haystack's pages in both layers; the others reuse them.
    assert counted["pages_sealed"] < 2 * 2 * CONTEXT // 256


def test_sliding_window_of_the_same_budget_fails(models):
    model = build(models / "needle-window", sliding_window=TOP_K + 64 + 256)
    text = haystack(4096, DEPTHS)
    with engine(model, dtype="bfloat16", max_model_len=4160) as llm:
        assert ask(llm, text, range(4)) == [False] * 4
        # Its last needle lies inside the window: the control fails for want of memory, not for another reason.
        assert ask(llm, text, [4]) == [True]


def test_a_small_selection_with_reversed_scores_fails(needle_folder):
    """With the factors' scores reversed the same number of rows is not enough: rows are found, not guessed."""
    text = haystack(4096, DEPTHS)
    settings = {"top_k": 64, "page_size": 64, "residual": "none"}
    with engine(needle_folder, settings, dtype="bfloat16", max_model_len=4160) as llm:
        assert ask(llm, text, range(5)) == [True] * 5
        layers = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.vllm_config
        for layer in layers.compilation_config.static_forward_context.values():
            # Reversed, not zeroed: which of equal scores are selected is open, and may include a needle.
            layer.impl.layer.factors.projection_scale.neg_()
        assert ask(llm, text, range(4)) == [False] * 4
