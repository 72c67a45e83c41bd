"""Tokens that are drafted and rejected must not show: the tokens of an engine that speculates are those of one that
does not, whatever is accepted, and nothing stays in use."""

import random

import pytest
from calibrations import calibration_of
from drafts import NGRAM, KnowingDrafter, acceptance
from engines import (
    MIB,
    assert_nothing_in_use,
    counters,
    engine,
    greedy,
    scheduler,
    tiny_gemma3,
    tiny_llama,
    token_prompts,
)
from needle_model import haystack, vocabulary
from schedules import count_preemptions, host_memory_for, note_lone_tokens, run_schedule, serve_alone, tokens

pytestmark = pytest.mark.engine

PAGE = 16
"""So small that drafts reach over the ends of pages."""
SPARSE = {"page_size": PAGE, "top_k": 48, "recent_tokens": 8, "factorization": "key_pca", "rank": 8}
ALONE = {"enable_prefix_caching": False, "max_num_seqs": 1}
SPECULATING = {"speculative_config": NGRAM, "disable_log_stats": False}
COUNT = 40


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


@pytest.fixture(scope="module")
def alone(model):
    with engine(model, SPARSE, **ALONE) as llm:
        yield serve_alone(llm)


def assert_drafts_do_not_show(llm, prompts, expected):
    """All prompts at once, with drafts of which some are accepted and some are not."""
    drafter = KnowingDrafter(llm)
    for prompt, answer in zip(prompts, expected):
        drafter.know(prompt, answer)
    assert tokens(greedy(llm, prompts, COUNT)) == expected
    assert_nothing_in_use(llm)
    drafted, accepted = acceptance(llm)
    assert 0.2 * drafted < accepted < 0.9 * drafted
    assert drafted > 20 * len(prompts)


@pytest.mark.parametrize("hot_cache", [False, True])
def test_same_tokens_in_chunked_prefill(model, alone, hot_cache):
    prompts = token_prompts([1, 3, PAGE - 1, PAGE, 100, 333])
    expected = [alone(prompt, COUNT) for prompt in prompts]
    limits = {"max_num_batched_tokens": 40, "max_num_seqs": 4}
    with engine(model, {**SPARSE, "hot_cache": hot_cache}, **SPECULATING, **limits) as llm:
        assert_drafts_do_not_show(llm, prompts, expected)
        assert (counters(llm)["rows_hit"] > 0) == hot_cache


def test_ngrams_of_repeated_text(needle_folder):
    """A model that repeats what it has read, so that vLLM's own drafts are accepted."""
    from vllm import TokensPrompt

    ids = {word: i for i, word in enumerate(vocabulary())}
    text = [ids[word] for word in haystack(400, []).split()]
    prompts = [TokensPrompt(prompt_token_ids=text + text[:length]) for length in (30, 47, 64)]
    settings, limits = {"top_k": 64, "page_size": 64}, {"dtype": "bfloat16", "max_model_len": 2048}
    with engine(needle_folder, settings, **limits) as llm:
        expected = tokens(greedy(llm, prompts, 100))
        steps = counters(llm)["decode_tokens"]
    with engine(needle_folder, settings, **limits, **SPECULATING) as llm:
        assert tokens(greedy(llm, prompts, 100)) == expected
        drafted, accepted = acceptance(llm)
        assert accepted > 0.9 * drafted > 100
        # Drafts decode as tokens of their own.
        assert counters(llm)["decode_tokens"] >= steps


@pytest.mark.parametrize("factorization", ["lrqk", "calibrated"])
def test_factors_of_pages_are_those_of_their_tokens(model, factorization):
    settings = {**SPARSE, "factorization": factorization}
    if factorization == "calibrated":
        settings["calibration"] = calibration_of(model, page_size=PAGE)
    prompts = token_prompts([90, 100])
    with engine(model, settings, **ALONE) as llm:
        expected = [tokens(greedy(llm, [prompt], COUNT))[0] for prompt in prompts]
    with engine(model, settings, **SPECULATING) as llm:
        assert_drafts_do_not_show(llm, prompts, expected)


def test_aqua(model):
    settings = {"calibration": calibration_of(model, page_size=PAGE), "keep": 0.5, "block_size": 32}
    pool, prompts = {"kv_cache_memory_bytes": 64 * MIB}, token_prompts([90, 30])
    with engine(model, settings, "AQUA", **pool, **ALONE) as llm:
        expected = [tokens(greedy(llm, [prompt], COUNT))[0] for prompt in prompts]
    with engine(model, settings, "AQUA", **pool, **SPECULATING) as llm:
        assert_drafts_do_not_show(llm, prompts, expected)


def test_beside_sliding_windows(models):
    gemma, prompts = tiny_gemma3(models), token_prompts([90, 130])
    with engine(gemma, SPARSE, has_windows=True, **ALONE) as llm:
        expected = [tokens(greedy(llm, [prompt], COUNT))[0] for prompt in prompts]
    with engine(gemma, SPARSE, has_windows=True, **SPECULATING) as llm:
        assert_drafts_do_not_show(llm, prompts, expected)


def test_random_schedules_with_aborts_and_preemption(model, alone):
    """A request that is preempted is recomputed exactly where it had decoded sparsely: its tokens count until then."""
    generator = random.Random(0)
    lengths = [5, 20, 31, 32, 47, 60, 75, 90, 110, 128]
    pool = token_prompts(lengths, shared=32)
    room = {"host_memory_gib": host_memory_for(14, PAGE), "hot_cache": True}
    limits = {"max_model_len": 192, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    with engine(model, {**SPARSE, **room}, **limits, **SPECULATING) as llm:
        drafter, preempted, lone = KnowingDrafter(llm), count_preemptions(llm), note_lone_tokens(llm)
        for prompt in pool:
            drafter.know(prompt, alone(prompt, COUNT))
        compared = aborted = pushed_out = 0
        for _ in range(100):
            requests = [
                {
                    "prompt": generator.choice(pool),
                    "tokens": generator.randint(1, 32),
                    "arrives": generator.randint(0, 8),
                    "aborted_after": generator.choice([None, None, None, generator.randint(0, 12)]),
                }
                for _ in range(generator.randint(1, 5))
            ]
            preempted.clear()
            lone.clear()
            finished = run_schedule(llm, [request["prompt"] for request in requests], requests)
            assert_nothing_in_use(llm)
            assert not scheduler(llm).requests
            sparse = {name.split("-")[0] for name in lone}
            until = dict(reversed(preempted))
            for i, request in enumerate(requests):
                if i not in finished:
                    assert request["aborted_after"] is not None
                    aborted += 1
                    continue
                assert len(finished[i]) == request["tokens"]
                if str(i) not in sparse:
                    count = until.get(str(i), request["tokens"])
                    assert finished[i][:count] == alone(request["prompt"], COUNT)[:count]
                    compared += 1
            pushed_out += len(until)
        drafted, accepted = acceptance(llm)
    assert compared > 150
    assert aborted > 20
    assert pushed_out > 10
    assert 0.2 * drafted < accepted < 0.9 * drafted
