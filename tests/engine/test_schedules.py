"""What vLLM's scheduler does to requests must not show in their tokens, and must leave nothing behind."""

import pytest
from engines import assert_nothing_in_use, counters, engine, greedy, tiny_llama, token_prompts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schedules import count_preemptions, host_memory_for, note_lone_tokens, run_schedule, serve_alone, tokens

pytestmark = pytest.mark.engine

PAGE = 64
# Selection may depend on where chunks end (their queries take part in the fit), so schedules are compared
# where the fit does not look at queries. A preempted request is recomputed by exact attention, where it had
# decoded sparsely, so under preemption the selection covers everything.
SPARSE = {"page_size": PAGE, "top_k": 48, "recent_tokens": 16, "factorization": "key_pca", "rank": 8}
COVERING = {**SPARSE, "top_k": 1024}


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


@pytest.fixture(scope="module")
def alone(model):
    with engine(model, SPARSE, enable_prefix_caching=False, max_num_seqs=1) as llm:
        yield serve_alone(llm)


@pytest.fixture(scope="module")
def dense_alone(model):
    with engine(model, enable_prefix_caching=False, max_num_seqs=1) as llm:
        yield serve_alone(llm)


def test_prompt_lengths_around_the_selection(model, alone):
    top_k, recent = SPARSE["top_k"], SPARSE["recent_tokens"]
    edges = [top_k - 1, top_k, top_k + 1, top_k + recent - 1, top_k + recent, top_k + recent + 1]
    prompts = token_prompts([1, 2, PAGE - 1, PAGE, PAGE + 1, *edges, 5 * PAGE + 7])
    with engine(model, SPARSE) as llm:
        assert tokens(greedy(llm, prompts, 20)) == [alone(prompt, 20) for prompt in prompts]
    with engine(model, {**SPARSE, "hot_cache": True}) as llm:
        assert tokens(greedy(llm, prompts, 20)) == [alone(prompt, 20) for prompt in prompts]


def test_chunked_prefill_mixed_with_decode(model, alone):
    prompts = token_prompts([700, 30, 450, 129, 64, 900])
    with engine(model, SPARSE, max_num_batched_tokens=100, max_num_seqs=3) as llm:
        assert tokens(greedy(llm, prompts, 24)) == [alone(prompt, 24) for prompt in prompts]


def test_prefix_cache_reuses_pages(model, alone):
    first, second = token_prompts([600, 640], shared=512)
    with engine(model, {**SPARSE, "hot_cache": True}) as llm:
        assert tokens(greedy(llm, [first], 16)) == [alone(first, 16)]
        sealed = counters(llm)["pages_sealed"]
        assert tokens(greedy(llm, [second], 16)) == [alone(second, 16)]
        # 512 shared tokens are 8 pages; the second prompt seals only its other two, in two layers.
        assert counters(llm)["pages_sealed"] - sealed == 2 * 2
        assert tokens(greedy(llm, [first, second], 16)) == [alone(first, 16), alone(second, 16)]


@pytest.mark.parametrize("hot_cache", [False, True])
def test_long_decode_under_preemption(model, dense_alone, hot_cache):
    prompts = token_prompts([150, 200, 250])
    # Room for about 1,000 tokens where the three requests grow to 2,400: they push each other out.
    tight = {**COVERING, "hot_cache": hot_cache, "host_memory_gib": host_memory_for(17, PAGE)}
    with engine(model, tight, max_model_len=900, max_num_seqs=3) as llm:
        preempted = count_preemptions(llm)
        assert tokens(greedy(llm, prompts, 600)) == [dense_alone(prompt, 600) for prompt in prompts]
        assert len(preempted) >= 2


def test_long_sparse_decode_under_preemption(model, alone):
    prompts = token_prompts([150, 200, 250])
    tight = {**SPARSE, "hot_cache": True, "host_memory_gib": host_memory_for(17, PAGE)}
    with engine(model, tight, max_model_len=900, max_num_seqs=3) as llm:
        preempted = count_preemptions(llm)
        served = tokens(greedy(llm, prompts, 600))
        assert len(preempted) >= 2
        counted = counters(llm)
        # The request that was never pushed out has its own tokens, as far as rounding in a batch of three leaves
        # every selection as it is; every step attended to its budget only.
        assert alone(prompts[0], 600)[:100] == served[0][:100]
    assert [len(answer) for answer in served] == [600] * 3
    assert counted["rows_attended"] <= counted["decode_tokens"] * 2 * (48 + 16 + 4 + PAGE)


def test_abort_in_the_middle(model, alone):
    from vllm import SamplingParams

    prompts = token_prompts([900, 300, 40])
    parameters = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    with engine(model, {**SPARSE, "hot_cache": True}, max_num_batched_tokens=128) as llm:
        for name, prompt in zip("abc", prompts):
            llm.llm_engine.add_request(name, prompt, parameters)
        for _ in range(3):
            llm.llm_engine.step()  # the first prompt is still in its prefill
        llm.llm_engine.abort_request(["a"])
        for _ in range(6):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["b", "c"])
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert_nothing_in_use(llm)
        assert tokens(greedy(llm, prompts, 16)) == [alone(prompt, 16) for prompt in prompts]


def test_several_samples_per_prompt(model, alone):
    from vllm import SamplingParams

    prompt = token_prompts([330])[0]
    parameters = SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=24, ignore_eos=True, detokenize=False)
    with engine(model, {**SPARSE, "hot_cache": True}, max_num_seqs=3) as llm:
        samples = llm.generate([prompt], parameters, use_tqdm=False)[0].outputs
        assert len({tuple(sample.token_ids) for sample in samples}) == 4
        assert tokens(greedy(llm, [prompt], 16)) == [alone(prompt, 16)]


request = st.fixed_dictionaries(
    {
        "length": st.integers(1, 400),
        "shared": st.sampled_from([0, 0, 64, 128, 200]),
        "tokens": st.integers(1, 40),
        "arrives": st.integers(0, 12),
        "aborted_after": st.one_of(st.none(), st.integers(0, 20)),
    }
)


AT_ONCE = {"shared": 0, "arrives": 0, "aborted_after": None}


@pytest.fixture(scope="module", params=["covering", "sparse"])
def schedule_engine(request, model):
    """Covering: room for about one and a half long requests; sparse: room for all of them."""
    limits = {"max_model_len": 448, "max_num_seqs": 4, "max_num_batched_tokens": 96}
    covering = request.param == "covering"
    settings_ = COVERING if covering else SPARSE
    with engine(
        model,
        {**settings_, "host_memory_gib": host_memory_for(12 if covering else 40, PAGE), "hot_cache": True},
        **limits,
    ) as llm:
        preempted = count_preemptions(llm)
        yield request.param, llm, note_lone_tokens(llm)
        # A schedule that never runs out of memory would not test what this one is for.
        assert bool(preempted) == covering


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(requests=st.lists(request, min_size=1, max_size=7), seed=st.integers(0, 3))
# Four requests that need three pages at first and four in the end: twelve pages are too few for three of them.
@example(requests=[{**AT_ONCE, "length": 180, "tokens": 40}] * 4, seed=0)
def test_random_schedules(schedule_engine, alone, dense_alone, requests, seed):
    kind, llm, lone = schedule_engine
    lone.clear()
    expected = dense_alone if kind == "covering" else alone
    common = token_prompts([256], seed=seed)[0]["prompt_token_ids"]
    prompts = token_prompts([r["length"] for r in requests], seed=10 + seed)
    for r, prompt in zip(requests, prompts):
        shared = min(r["shared"], r["length"] - 1)
        prompt["prompt_token_ids"][:shared] = common[:shared]
    finished = run_schedule(llm, prompts, requests)
    assert_nothing_in_use(llm)
    for i, r in enumerate(requests):
        if i in finished and (kind == "covering" or str(i) not in {name.split("-")[0] for name in lone}):
            assert finished[i] == expected(prompts[i], r["tokens"])
        elif i in finished:
            assert len(finished[i]) == r["tokens"]
        else:
            assert r["aborted_after"] is not None
