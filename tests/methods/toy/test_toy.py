"""Another method is a folder and a line: this one, unknown to the package, is served by a real engine."""

from pathlib import Path

import pytest
from engines import counters, engine, greedy, tiny_llama, token_prompts
from startup import sentence, start

from vllm_lrqk.methods import METHODS
from vllm_lrqk.plugin import register

pytestmark = pytest.mark.engine

LENGTHS = [1, 2, 31, 32, 33, 150]


@pytest.fixture(scope="module", autouse=True)
def toy():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setitem(METHODS, "TOY", "toy_method:Toy")
        register()
        yield


@pytest.fixture(scope="module")
def model(models):
    return tiny_llama(models, 4, 2, 64)


def test_dense_tokens(model):
    """In batches, in chunks, and again with a cached prefix."""
    prompts = token_prompts(LENGTHS)
    with engine(model) as llm:
        dense = [list(output.token_ids) for output in greedy(llm, prompts, 20)]
    with engine(model, {}, "TOY", max_num_batched_tokens=50, max_num_seqs=4, kv_cache_memory_bytes=1 << 26) as llm:
        for _ in range(2):
            assert [list(output.token_ids) for output in greedy(llm, prompts, 20)] == dense
        counted = counters(llm)
        assert counted["rows_read"] > 0
        assert counted["device_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
        assert counted["host_bytes_per_token"] == 0
        metrics = llm.llm_engine.vllm_config.cache_config
        assert metrics.block_size == 32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 8}, ["toy.block_size", "8", "16, 32, 64"]),
        ({"longest": 100}, ["toy.longest", "100"]),
        ({"longset": 100}, ["toy.longset", "longest"]),
    ],
)
def test_its_refusals_end_start_up(model, settings, words):
    with pytest.raises(ValueError) as error:
        start(model, attention_backend="TOY", additional_config={"toy": settings})
    assert all(word in sentence(error) for word in words), sentence(error)
