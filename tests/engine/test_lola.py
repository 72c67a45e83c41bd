"""LoLA in a real engine: constant memory per request, and tokens that do not show how vLLM scheduled them."""

import pytest
import torch
from calibrations import calibration_of
from engines import counters, engine, greedy, scheduler, tiny_llama, token_prompts
from safetensors.torch import save_file
from startup import sentence, start
from transformers import AutoConfig

pytestmark = pytest.mark.engine

# Small enough that most of a prompt is in the state.
SMALL = {"window": 32, "chunk": 16, "cache": 24, "state_rank": 8}
LENGTHS = [1, 2, 47, 48, 49, 63, 200, 500]


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


def lola(model, values=SMALL, **settings):
    return engine(model, values, "LOLA", **({"kv_cache_memory_bytes": 1 << 26} | settings))


def tokens(llm, prompts, count=24):
    return [list(output.token_ids) for output in greedy(llm, prompts, count)]


def add_requests(llm, prompts, count):
    """Requests "0", "1", ... that nobody has stepped yet."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    for name, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(name), prompt, parameters)


@pytest.fixture(scope="module")
def alone(model):
    """Whole prompts, one at a time."""
    with lola(model, max_num_seqs=1) as llm:
        return [tokens(llm, [prompt])[0] for prompt in token_prompts(LENGTHS)]


def test_a_window_over_all_tokens_is_dense(model):
    prompts = token_prompts([1, 63, 500])
    with engine(model) as llm:
        dense = tokens(llm, prompts)
    with lola(model, {"window": 1024}) as llm:
        assert tokens(llm, prompts) == dense


@pytest.mark.parametrize(
    ("settings"),
    [
        {"max_num_seqs": 4},
        {"max_num_seqs": 4, "max_num_batched_tokens": 256},
        {"max_num_seqs": 4, "max_num_batched_tokens": 300},
        {"max_num_seqs": 3, "max_num_batched_tokens": 60},
    ],
    ids=["batch", "chunks of 256", "chunks of 300", "chunks of 60"],
)
def test_schedules_do_not_show(model, alone, settings):
    with lola(model, **settings) as llm:
        assert tokens(llm, token_prompts(LENGTHS)) == alone


def test_prefix_caching_is_switched_off(model, alone):
    """As docs/lola.md says: the same prompt again is computed again."""
    with lola(model, enable_prefix_caching=True) as llm:
        assert not llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        for _ in range(2):
            assert tokens(llm, token_prompts(LENGTHS)[-1:]) == alone[-1:]


def test_calibrated_directions_serve(model, alone):
    """They change what the state recalls, and cuts and company do not show with them either."""
    settings = SMALL | {"directions": calibration_of(model)}
    with lola(model, settings, max_num_seqs=1) as llm:
        calibrated = [tokens(llm, [prompt])[0] for prompt in token_prompts(LENGTHS)]
    with lola(model, settings, max_num_seqs=4, max_num_batched_tokens=60) as llm:
        assert tokens(llm, token_prompts(LENGTHS)) == calibrated
    assert calibrated[:2] == alone[:2]  # nothing leaves the window
    assert calibrated[-1] != alone[-1]


@pytest.mark.parametrize("key_heads", [2, 4], ids=["maps per KV head", "maps per query head"])
def test_hedgehog_maps_serve(model, alone, tmp_path, key_heads):
    """Random maps: what the state recalls is another, and cuts and company do not show."""
    maps, generator = {}, torch.Generator().manual_seed(0)
    for layer in range(AutoConfig.from_pretrained(model).num_hidden_layers):
        for name, heads in (("query_map", 4), ("key_map", key_heads)):
            maps[f"layers.{layer}.{name}"] = 0.2 * torch.randn(heads, 64, 64, generator=generator)
    save_file(maps, tmp_path / "maps.safetensors")
    settings = {"window": 32, "chunk": 16, "cache": 24, "state": "hedgehog"}
    settings["feature_maps"] = str(tmp_path / "maps.safetensors")
    with lola(model, settings, max_num_seqs=1) as llm:
        hedgehog = [tokens(llm, [prompt])[0] for prompt in token_prompts(LENGTHS)]
    with lola(model, settings, max_num_seqs=4, max_num_batched_tokens=60) as llm:
        assert tokens(llm, token_prompts(LENGTHS)) == hedgehog
    assert hedgehog[:2] == alone[:2]  # nothing leaves the window
    assert hedgehog[-1] != alone[-1]


def test_small_memory_does_not_show(model, alone):
    """Room for two requests: the others wait, and take over blocks that are full of others' memory."""
    with lola(model) as llm:
        block = scheduler(llm).kv_cache_config.kv_cache_groups[0].kv_cache_spec.page_size_bytes
    with lola(model, kv_cache_memory_bytes=2 * 3 * block) as llm:
        assert scheduler(llm).kv_cache_manager.block_pool.num_gpu_blocks == 3  # one is vLLM's null block
        for _ in range(2):
            assert tokens(llm, token_prompts(LENGTHS)) == alone


def test_preemption_does_not_show(model, alone):
    """Running requests lose their memory every few steps and are computed anew, some while chunks of their prompt
    are still missing, some amid their answers."""
    with lola(model, max_num_seqs=4, max_num_batched_tokens=256) as llm:
        preempted, found, steps = [], {}, 0
        preempt = scheduler(llm)._preempt_request

        def count(request, *arguments, **keywords):
            preempted.append(request.num_output_tokens)
            return preempt(request, *arguments, **keywords)

        scheduler(llm)._preempt_request = count
        add_requests(llm, token_prompts(LENGTHS), 24)
        while llm.llm_engine.has_unfinished_requests():
            found |= {int(out.request_id): list(out.outputs[0].token_ids) for out in llm.llm_engine.step()}
            steps += 1
            if steps % 9 == 0:
                assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        assert [found[i] for i in range(len(LENGTHS))] == alone
        assert len(preempted) >= 6
        assert max(preempted) > 5


def test_a_request_takes_one_block_however_long_it_is(model):
    """1K, 4K and 64K tokens: one block of one size, also in an engine that takes 64K."""
    sizes = {}
    for longest in (2048, 65536):
        with lola(model, max_model_len=longest, max_num_batched_tokens=8192) as llm:
            pool = scheduler(llm).kv_cache_manager.block_pool
            (group,) = scheduler(llm).kv_cache_config.kv_cache_groups
            sizes[longest] = group.kv_cache_spec.page_size_bytes
            for length in (n for n in (64, 1024, 4096, 65532) if n < longest):
                used = set()
                add_requests(llm, token_prompts([length]), 4)
                while llm.llm_engine.has_unfinished_requests():
                    llm.llm_engine.step()
                    if llm.llm_engine.has_unfinished_requests():
                        used.add(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
                assert used == {1}, length
            assert counters(llm)["decode_tokens"] > 0
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 100}, ["lola.window", "100", "multiple of 16"]),
        ({"cache": 2}, ["lola.cache", "4 sink_tokens"]),
        ({"state_rank": 68}, ["lola.state_rank", "68", "head size", "64"]),
        ({"state": "hedgehog"}, ["lola.feature_maps", "null"]),
        ({"state": "hedgehog", "feature_maps": "/nowhere.pt"}, ["lola.feature_maps", "no such file"]),
    ],
)
def test_refusals_end_start_up(model, settings, words):
    with pytest.raises(ValueError) as error:
        start(model, attention_backend="LOLA", additional_config={"lola": settings})
    assert all(word in sentence(error) for word in words), sentence(error)
