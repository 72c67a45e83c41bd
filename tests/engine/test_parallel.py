"""Several ranks: each keeps the host pages of its own heads or layers."""

import json
import os
import subprocess
import sys

import pytest
from engines import engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine

LENGTHS = [1, 65, 200, 400]
TOKENS = 24

SCRIPT = """
import json, sys, time
from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    model, settings, prompts, tokens = json.loads(sys.argv[1])
    llm = LLM(model=model, skip_tokenizer_init=True, attention_backend="LRQK", dtype="float32",
              max_model_len=2048, max_num_seqs=4, **settings)
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    results = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    counters = llm.collective_rpc("lrqk_counters")
    time.sleep(2.5)  # series are written once a second
    shown = {s.name: s.value for m in REGISTRY.collect() for s in m.samples if s.name.startswith("vllm:lrqk_")}
    print("RESULT", json.dumps([[list(r.outputs[0].token_ids) for r in results], counters, shown]))
"""


def serve_in_processes(tmp_path, model, prompts, **settings):
    """Tokens, every rank's counters and the series of an engine with worker processes of its own."""
    script = tmp_path / "serve.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if os.cpu_count() and os.cpu_count() >= 2:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    arguments = json.dumps([str(model), settings, [p["prompt_token_ids"] for p in prompts], TOKENS])
    result = subprocess.run(
        [sys.executable, str(script), arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


# vLLM's CPU runner makes the pipeline's buffers in the warm-up run, which eager mode leaves out.
@pytest.mark.parametrize(("parallel", "eager"), [("tensor_parallel_size", True), ("pipeline_parallel_size", False)])
def test_two_ranks(tmp_path, models, parallel, eager):
    model = tiny_llama(models, 8, 2, 64)
    prompts = token_prompts(LENGTHS)
    with engine(model) as llm:
        dense = [list(output.token_ids) for output in greedy(llm, prompts, TOKENS)]
    settings = {"lrqk": {"page_size": 64, "top_k": 1024, "host_memory_gib": 0.5, "hot_cache": True}}
    tokens, counters, shown = serve_in_processes(
        tmp_path, model, prompts, additional_config=settings, enforce_eager=eager, **{parallel: 2}
    )
    assert tokens == dense
    assert len(counters) == 2
    for rank in counters:
        assert set(rank["implementations"].values()) == {"LRQKImpl"}
        assert rank["decode_tokens"] > 0
        # Half of the heads or half of the layers: nothing is kept twice.
        assert rank["host_bytes_per_token"] == 2 * 2 * 2 * 64 * 4 / 2
    for name in ("decode_tokens", "rows_attended", "rows_hit", "rows_missed"):
        assert shown[f"vllm:lrqk_{name}_total"] == sum(rank[name] for rank in counters), name
    assert shown["vllm:lrqk_host_pages_in_use"] == 0
