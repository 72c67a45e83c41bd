"""vLLM's Model Runner V2, which GPUs get, on the CPU platform: emulated and interpreted kernels, bfloat16.

The tokens of the first model runner with the same kernels, whose float32 tokens test_emulated_device.py compares with
the CPU platform's own: in bfloat16 those round elsewhere. Graphs and streams are not there; their metadata is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulated import emulated_operators
from engines import tiny_llama, token_prompts

ROOT = Path(__file__).resolve().parents[2]
PAGE = 16
SETTINGS = {
    "page_size": PAGE,
    "rank": 8,
    "top_k": 24,
    "recent_tokens": 8,
    "factorization": "key_pca",
    "hot_cache": True,
}
BATCHES = {"dtype": "bfloat16", "max_num_seqs": 3, "max_num_batched_tokens": 40, "max_model_len": 256}
COVERING = SETTINGS | {"top_k": 100}  # recomputed tokens are attended exactly
COVERING_BATCHES = BATCHES | {"max_model_len": 112}
LENGTHS, COUNT = [1, PAGE - 1, PAGE, 3 * PAGE + 1, 75], 8
SHARED_LENGTHS, SHARED, SHARED_COUNT = [50, 60, 40], 32, 24
FEW_PAGES = 10 * PAGE * 1024 / 2**30

pytestmark = pytest.mark.engine


def ids(prompts: list[Any]) -> list[list[int]]:
    return [prompt["prompt_token_ids"] for prompt in prompts]


@pytest.fixture(scope="module")
def model(models: Any) -> Any:
    return tiny_llama(models, 4, 2, 64)


@pytest.fixture(scope="module")
def results(model: Any) -> dict[str, Any]:
    """What each engine of tests/support/model_runner_v2.py says, by name."""
    emulated_operators()  # skips where they cannot be built
    plan = {
        "settings": SETTINGS,
        "batches": BATCHES,
        "prompts": ids(token_prompts(LENGTHS)),
        "count": COUNT,
        "roomy": COVERING,
        "tight": COVERING | {"host_memory_gib": FEW_PAGES},
        "tight_batches": COVERING_BATCHES,
        "shared": ids(token_prompts(SHARED_LENGTHS, shared=SHARED)),
        "tight_count": SHARED_COUNT,
    }
    paths = [str(ROOT), str(ROOT / "tests/support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(ROOT / "tests/support/model_runner_v2.py"), str(model)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    lines = [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    return {line["name"]: line for line in lines}


@pytest.fixture(scope="module")
def expected(results: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Tokens of the first model runner."""
    assert results["first runner"]["runner"] == "vllm.v1.worker.gpu_model_runner"
    return {"plain": results["first runner"]["tokens"], "shared": results["first runner, roomy"]["tokens"]}


def test_same_tokens(results: dict[str, Any], expected: dict[str, Any]) -> None:
    found = results["plain"]
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner"
    assert found["decoders"] == ["CudaDecoder"]
    assert found["tokens"] == expected["plain"]
    assert found["counters"]["rows_hit"] > 0
    assert found["counters"]["rows_missed"] > 0
    assert found["counters"]["pages_sealed"] > 0


def test_same_tokens_after_warm_up(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """vLLM's warm-up hands out block ids of its own, and hot blocks that overlap."""
    found = results["warm_up"]
    assert found["did"]["is_mixed"]
    assert found["did"]["most_requests"] == BATCHES["max_num_seqs"]
    assert found["tokens"] == expected["plain"]


def test_same_tokens_after_captures(results: dict[str, Any], expected: dict[str, Any]) -> None:
    """The metadata of captures: padding alone, until a replay finds lengths in vLLM's buffers."""
    found = results["capture"]
    assert [(run["full"], run["decodes"]) for run in found["did"]][:2] == [(True, 3), (True, 1)]
    assert all(not any(run["lens"]) and run["is_finite"] for run in found["did"] if run["full"])
    assert found["tokens"] == expected["plain"]


def test_asynchronous_scheduling_and_preemption(results: dict[str, Any], expected: dict[str, Any]) -> None:
    found = results["asynchronous"]
    assert found["scheduler"] == "AsyncScheduler"
    assert found["preempted"] > 0
    assert found["tokens"] == expected["shared"]


def test_cached_prefix(results: dict[str, Any], expected: dict[str, Any]) -> None:
    assert results["cached"]["cached_tokens"] >= 2 * PAGE
    assert results["cached"]["tokens"] == [expected["shared"][1][:6]]
