"""Two ranks of tensor parallelism: they calibrate to what one does, and each serves its own heads."""

import json
import os
import subprocess
import sys

import pytest
import torch
from calibrations import calibration_of
from engines import engine, greedy, tiny_llama, token_prompts
from safetensors.torch import load_file

pytestmark = pytest.mark.engine
LENGTHS = [1, 65, 200, 400]
TOKENS = 16

CALIBRATE = """
import json, sys
from pathlib import Path
from calibrations import calibration_of
if __name__ == "__main__":
    model, file = json.loads(sys.argv[1])
    calibration_of(Path(model), file=Path(file), tensor_parallel_size=2)
    print("RESULT", json.dumps(None))
"""
SERVE = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
if __name__ == "__main__":
    model, aqua, prompts, tokens = json.loads(sys.argv[1])
    llm = LLM(model=model, skip_tokenizer_init=True, attention_backend="AQUA", additional_config={"aqua": aqua},
              dtype="float32", max_model_len=2048, max_num_seqs=4, enforce_eager=True, tensor_parallel_size=2,
              kv_cache_memory_bytes=1 << 26)
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    results = llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)
    print("RESULT", json.dumps([list(r.outputs[0].token_ids) for r in results]))
"""


def run(tmp_path, source, arguments):
    """What a script says that runs in a process of its own, whose engine has two workers."""
    script = tmp_path / "script.py"
    script.write_text(source)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])
    if os.cpu_count() and os.cpu_count() >= 2:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    command = [sys.executable, str(script), json.dumps(arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_two_ranks_calibrate_and_serve(tmp_path, models, kv_heads):
    """One KV head for each rank, or one that both have with half of its query heads each."""
    model = tiny_llama(models, 8, kv_heads, 64)
    single, double = calibration_of(model), tmp_path / "double.safetensors"
    run(tmp_path, CALIBRATE, [str(model), str(double)])
    ours, theirs = load_file(double), load_file(single)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-3, rtol=1e-3)
    prompts = token_prompts(LENGTHS)
    with engine(model) as llm:
        dense = [list(output.token_ids) for output in greedy(llm, prompts, TOKENS)]
    aqua = {"calibration": str(double), "keep": 1.0}
    ids = [prompt["prompt_token_ids"] for prompt in prompts]
    assert run(tmp_path, SERVE, [str(model), aqua, ids, TOKENS]) == dense
