"""Features of vLLM that no method may stand in the way of: each gives with a covering method what it gives without.

Every engine runs all of them on one model with the same settings; the tests compare one after the other.
"""

import json
import re

import pytest
import torch
from calibrations import calibration_of
from engines import engine, scheduler
from safetensors.torch import save_file

from vllm_lrqk.evaluation.arguments import SHIPPED_MODEL

pytestmark = pytest.mark.engine

METHODS = {"LRQK": {"top_k": 2048}, "LOLA": {"window": 1024}, "AQUA": {"keep": 1.0}}
"""Settings under which each is dense attention."""
PROMPTS = ["The key of the red door is 4711. " * 20, "def add(a, b):\n    return", "One two three"]
SCHEMA = {"type": "object", "properties": {"key": {"type": "integer"}}, "required": ["key"], "maxProperties": 1}


@pytest.fixture(scope="module")
def model():
    """The one that comes with the package, as it has a tokenizer."""
    return SHIPPED_MODEL


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A LoRA adapter of rank 8 for queries and values, random and large enough to change answers."""
    config = json.loads((model / "config.json").read_text())
    hidden, head_size = config["hidden_size"], config["head_dim"]
    sizes = {
        "q_proj": config["num_attention_heads"] * head_size,
        "v_proj": config["num_key_value_heads"] * head_size,
    }
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(config["num_hidden_layers"]):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn(size, 8, generator=generator) * 0.3
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(sizes), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def run_all(llm, adapter):
    """What every feature gives, by its name."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    def texts(parameters, **keywords):
        outputs = llm.generate(PROMPTS, parameters, use_tqdm=False, **keywords)
        return [[list(one.token_ids) for one in output.outputs] for output in outputs]

    def constrained(**keywords):
        rules = StructuredOutputsParams(**keywords)
        parameters = SamplingParams(temperature=0, max_tokens=40, structured_outputs=rules)
        return [output.outputs[0].text for output in llm.generate(PROMPTS, parameters, use_tqdm=False)]

    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = {"plain": texts(greedy), "LoRA": texts(greedy, lora_request=LoRARequest("adapter", 1, str(adapter)))}
    drawn = SamplingParams(n=3, seed=7, temperature=1.0, max_tokens=12, ignore_eos=True)
    found["n"] = texts(drawn)
    # Without those of prompts: vLLM's CPU platform cannot give them where LoRA is enabled.
    scored = SamplingParams(temperature=0, max_tokens=12, logprobs=4, ignore_eos=True)
    found["log-probabilities"] = [
        [{token: entry.logprob for token, entry in position.items()} for position in output.outputs[0].logprobs]
        for output in llm.generate(PROMPTS, scored, use_tqdm=False)
    ]
    found["regex"], found["JSON"] = constrained(regex="[0-9]{4}-[a-f]{2}"), constrained(json=SCHEMA)
    found["order"] = finishing_order(llm, greedy)
    return found


def finishing_order(llm, parameters):
    """Of three requests of one length, two at a time, of which the last has the highest priority."""
    for name, priority in (("first", 5), ("second", 5), ("urgent", 0)):
        llm.llm_engine.add_request(name, {"prompt_token_ids": [1, 2, 3]}, parameters, priority=priority)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [output.request_id for output in llm.llm_engine.step() if output.finished]
    return finished


def results_of(model, adapter, folder, method=None):
    values = None if method is None else dict(METHODS[method])
    if method == "AQUA":
        values["calibration"] = calibration_of(model, file=folder / "calibration.safetensors")
    settings = {"skip_tokenizer_init": False, "max_num_seqs": 2, "scheduling_policy": "priority"}
    with engine(model, values, method or "LRQK", enable_lora=True, max_model_len=1024, **settings) as llm:
        assert scheduler(llm).policy.name == "PRIORITY"
        return run_all(llm, adapter)


@pytest.fixture(scope="module")
def dense(model, adapter, tmp_path_factory):
    return results_of(model, adapter, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=METHODS)
def served(request, model, adapter, tmp_path_factory):
    return results_of(model, adapter, tmp_path_factory.mktemp("served"), request.param)


def test_lora(served, dense):
    assert served["plain"] == dense["plain"]
    assert served["LoRA"] == dense["LoRA"] != dense["plain"]


def test_several_samples_of_a_prompt(served, dense):
    assert served["n"] == dense["n"]
    assert all(len({tuple(sample) for sample in samples}) == 3 for samples in served["n"])


def test_log_probabilities(served, dense):
    """Tolerance: float32 sums in another order, through all layers."""
    for ours, theirs in zip(served["log-probabilities"], dense["log-probabilities"]):
        assert len(ours) == len(theirs) > 8
        for mine, other in zip(ours, theirs):
            common = mine.keys() & other.keys()
            assert len(common) >= 2
            for token in common:
                assert mine[token] == pytest.approx(other[token], abs=2e-3)


def test_structured_output(served, dense):
    assert served["regex"] == dense["regex"] and served["JSON"] == dense["JSON"]
    assert all(re.fullmatch("[0-9]{4}-[a-f]{2}", text) for text in served["regex"])
    assert all(text.lstrip().startswith("{") for text in served["JSON"])


def test_priorities(served):
    assert served["order"][-1] == "second" and "urgent" in served["order"][:2]
