"""What scripts/gpu_vllm.py asks of vLLM, stage by stage, in a process of its own each."""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from typing import Any

from gpu_vllm_model import CPU_SHAPE, GPU_SHAPE

TOKENS = 24
TOLERANCE = 0.5  # of a bfloat16 model's log-probabilities, as in tests/engine/test_dense.py
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # full graphs of decode steps, without torch.compile
COVERING = {"top_k": 4096, "host_memory_gib": 1.0}
SPARSE = {"top_k": 256, "host_memory_gib": 1.0}


def start(plan: argparse.Namespace, lrqk: dict[str, Any] | None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """An engine in this process, and what it turned out to run."""
    from vllm import LLM

    begin = time.perf_counter()
    arguments: dict[str, Any] = {
        "model": str(plan.model),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 4096,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,  # longer prompts come in chunks
        "skip_tokenizer_init": True,
        "seed": 0,
        "attention_backend": plan.backend if lrqk is None else "LRQK",
    }
    if lrqk is not None:
        arguments["additional_config"] = {"lrqk": lrqk}
    if not plan.cpu:
        arguments["gpu_memory_utilization"] = 0.6
    elif lrqk is None:
        arguments["kv_cache_memory_bytes"] = 512 << 20
    llm = LLM(**(arguments | settings))
    config = llm.llm_engine.vllm_config
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
    facts = {
        "start_s": time.perf_counter() - begin,
        "layers": dict(Counter(type(impl).__name__ for impl in impls)),
        "flash_attention_version": getattr(impls[0], "vllm_flash_attn_version", None),
        "runner": type(worker.model_runner).__module__,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "compilation_mode": str(config.compilation_config.mode),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "num_blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
    }
    print("started", facts, flush=True)
    served_by_lrqk = set(facts["layers"]) == {"LRQKImpl"}
    if served_by_lrqk != (lrqk is not None):
        raise RuntimeError(f"the layers run {facts['layers']}")
    return llm, facts


def stop(llm: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """End the engine; every block must be free again."""
    from engines import assert_nothing_in_use, shut_down

    assert_nothing_in_use(llm)
    begin = time.perf_counter()
    shut_down(llm)
    return facts | {"stop_s": time.perf_counter() - begin}


def prompts_of(plan: argparse.Namespace) -> list[Any]:
    from engines import token_prompts

    lengths = [1, 63, 200, 321] if plan.cpu else [1, 63, 700, 3000]
    return token_prompts(lengths, (CPU_SHAPE if plan.cpu else GPU_SHAPE)["vocab"])


def answer(plan: argparse.Namespace, lrqk: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Greedy tokens of all prompts with their best log-probabilities."""
    from engines import counters, greedy

    llm, facts = start(plan, lrqk, **settings)
    begin = time.perf_counter()
    outputs = greedy(llm, prompts_of(plan), TOKENS, logprobs=5)
    facts["generate_s"] = time.perf_counter() - begin
    facts["tokens"] = [list(output.token_ids) for output in outputs]
    facts["logprobs"] = [
        [{str(token): entry.logprob for token, entry in place.items()} for place in output.logprobs]
        for output in outputs
    ]
    if lrqk is not None:
        facts["counters"] = counters(llm)
        if not facts["counters"]["decode_tokens"]:
            raise RuntimeError("LRQK answered no decode query")
    return stop(llm, facts)


def compare(ours: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log-probabilities, up to the first place of each prompt where rounding could have decided.

    Raises:
        RuntimeError: rounding does not explain a difference, or too little could be compared.
    """
    differences, ends, problems = [], [], []
    for a, b, top_a, top_b in zip(other["tokens"], ours["tokens"], other["logprobs"], ours["logprobs"]):
        end = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
        differences += [abs(top_a[i][str(a[i])] - top_b[i][str(a[i])]) for i in range(end)]
        ends.append(end)
        if end < len(a):
            gap = top_a[end][str(a[end])] - top_a[end].get(str(b[end]), float("-inf"))
            if gap > 2 * TOLERANCE:
                problems.append(f"token {end}: {a[end]} became {b[end]}, {gap:.2f} below it")
    total = sum(map(len, other["tokens"]))
    found = {
        "same_tokens": ours["tokens"] == other["tokens"],
        "compared": f"{len(differences)}/{total}",
        "equal_until": ends,
        "largest_difference": max(differences, default=0.0),
        "mean_difference": statistics.fmean(differences) if differences else 0.0,
    }
    print("compared", found, flush=True)
    if found["largest_difference"] > TOLERANCE:
        problems.append(f"log-probabilities differ by {found['largest_difference']:.2f}")
    if len(differences) < 0.5 * total:
        problems.append(f"only {found['compared']} tokens could be compared")
    if problems:
        raise RuntimeError("; ".join(problems))
    return found


def decode_time(plan: argparse.Namespace, lrqk: dict[str, Any] | None, **settings: Any) -> dict[str, Any]:
    """Times of an engine's steps: prompts of one length in one batch, then the same number of tokens for each."""
    from engines import counters, token_prompts
    from vllm import SamplingParams

    tokens = 8 if plan.cpu else 64
    llm, facts = start(
        plan,
        lrqk,
        max_model_len=plan.length + 256,
        max_num_seqs=plan.batch,
        max_num_batched_tokens=256 if plan.cpu else 8192,
        **settings,
    )
    parameters = SamplingParams(temperature=0, max_tokens=tokens + 8, ignore_eos=True, detokenize=False)
    shape = CPU_SHAPE if plan.cpu else GPU_SHAPE
    for index, prompt in enumerate(token_prompts([plan.length] * plan.batch, shape["vocab"], seed=1)):
        llm.llm_engine.add_request(str(index), prompt, parameters)
    begin = last = time.perf_counter()
    steps, seen, prefill = [], [0] * plan.batch, None
    before: dict[str, Any] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            seen[int(output.request_id)] = len(output.outputs[0].token_ids)
        now = time.perf_counter()
        if prefill is None and min(seen) > 0:
            prefill = now - begin
            before = counters(llm) if lrqk is not None else {}
            first, now = max(seen), time.perf_counter()
        elif prefill is not None and max(seen) < tokens + first and min(seen) > 4:
            steps.append(now - last)
        last = now
    milliseconds = sorted(1e3 * step for step in steps)
    facts |= {
        "length": plan.length,
        "batch": plan.batch,
        "prefill_s": prefill,
        "steps": len(steps),
        "step_ms": statistics.median(milliseconds),
        "step_ms_mean": statistics.fmean(milliseconds),
        "step_ms_p10": milliseconds[len(steps) // 10],
        "step_ms_p90": milliseconds[len(steps) * 9 // 10],
    }
    if lrqk is not None:
        after = counters(llm)
        numbers = {name for name, value in after.items() if isinstance(value, int | float)}
        facts["counters"] = {name: after[name] - before[name] for name in numbers if not name.endswith(("_token",))}
    return stop(llm, facts)


def imports() -> dict[str, Any]:
    """Versions, and vLLM's own kernels."""
    from importlib.metadata import entry_points, version

    import torch
    import vllm
    from vllm.platforms import current_platform

    plugins = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "lrqk"]
    facts = {
        "vllm": vllm.__version__,
        **{name: version(name) for name in ("torch", "triton", "transformers", "numpy")},
        "python": sys.version.split()[0],
        "platform": type(current_platform).__name__,
        "plugins": plugins,
    }
    if not plugins:
        raise RuntimeError("the entry point of the plugin was not found")
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        from vllm import _custom_ops

        values = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
        weight, out = torch.ones(64, device="cuda", dtype=torch.bfloat16), torch.empty_like(values)
        _custom_ops.rms_norm(out, values, weight, 1e-6)
        expected = torch.nn.functional.rms_norm(values.float(), (64,), eps=1e-6)
        facts["rms_norm_error"] = (out.float() - expected).abs().max().item()
        from vllm.vllm_flash_attn import flash_attn_interface

        facts["flash_attention_3"] = flash_attn_interface.FA3_AVAILABLE
        from vllm_lrqk.devices.cuda_library import load

        load()
    return facts


def run_stage(plan: argparse.Namespace) -> dict[str, Any]:
    """What a child process does: one stage."""
    scratch = plan.model.parent

    def earlier(name: str) -> dict[str, Any]:
        return json.loads((scratch / f"{name}.json").read_text())

    timed = {"top_k": plan.top_k, "host_memory_gib": plan.host_memory_gib}
    if plan.stage == "import":
        return imports()
    if plan.stage == "dense":
        return answer(plan, None)
    if plan.stage == "covering":
        facts = answer(plan, COVERING)
        return facts | {"against_dense": compare(facts, earlier("dense"))}
    if plan.stage in ("graphs", "compiled"):
        more = {"compilation_config": GRAPHS} if plan.stage == "graphs" else {}
        facts = answer(plan, COVERING, enforce_eager=False, **more)
        return facts | {"against_covering": compare(facts, earlier("covering"))}
    if plan.stage == "sparse":
        return answer(plan, SPARSE)
    if plan.stage == "time_dense":
        return decode_time(plan, None, enforce_eager=False, compilation_config=GRAPHS)
    if plan.stage == "time_lrqk":
        return decode_time(plan, timed, enforce_eager=False, compilation_config=GRAPHS)
    raise ValueError(f"no stage {plan.stage}")
