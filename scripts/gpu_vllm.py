"""vLLM with LRQK on a GPU, end to end, with a small random model: tokens against dense attention, graphs, decode times.

    PYTHONPATH=/tmp/site:. python3 scripts/gpu_vllm.py --output FOLDER [--stages dense covering ...]

For a machine that has nothing but what scripts/pack_vllm.py packed. Every stage is a process of its own under a time
limit, prints one line, and does not stop the others; FOLDER/vllm.json has their results, FOLDER/vllm.log their output.
`--cpu` tries the script itself on vLLM's CPU platform, with tiny shapes. Exit status: the number of stages that failed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 24
TOLERANCE = 0.5  # of a bfloat16 model's log-probabilities, as in tests/engine/test_dense.py
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}  # full graphs of decode steps, without torch.compile
COVERING = {"top_k": 4096, "host_memory_gib": 1.0}
SPARSE = {"top_k": 256, "host_memory_gib": 1.0}
GPU_SHAPE = {"hidden": 1024, "heads": 32, "kv_heads": 8, "head_size": 128, "layers": 4, "vocab": 4096}
CPU_SHAPE = {"hidden": 128, "heads": 8, "kv_heads": 2, "head_size": 64, "layers": 2, "vocab": 512}
LIMITS = {  # seconds; the order is that of a run
    "import": 60,
    "dense": 100,
    "covering": 100,
    "graphs": 100,
    "sparse": 80,
    "time_dense": 100,
    "time_lrqk": 100,
    "compiled": 150,
}
DEFAULT_STAGES = [name for name in LIMITS if name != "compiled"]
FALLBACKS = (  # of dense: (backend, further environment)
    ("FLASH_ATTN", {}),
    ("TRITON_ATTN", {}),
    ("FLASH_ATTN", {"VLLM_USE_V2_MODEL_RUNNER": "0"}),
)


def write_model(folder: Path, hidden: int, heads: int, kv_heads: int, head_size: int, layers: int, vocab: int) -> None:
    """A random bfloat16 Llama whose next token is decided clearly enough that two exact kernels agree on it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        # Large queries and keys give attention that depends on content, a large head clear decisions.
        return (torch.randn(rows, columns, generator=generator) * gain / columns**0.5).bfloat16()

    mlp = 4 * hidden
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden, 4.0)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_size, hidden, 2.0),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_size, hidden, 2.0),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_size),
            f"{prefix}.mlp.gate_proj.weight": matrix(mlp, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(mlp, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, mlp),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": vocab,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


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


def environment(scratch: Path, stage: str) -> dict[str, str]:
    """Of a child: in this process alone, without network, caches that go with the run."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(scratch / "vllm_cache"),
        "VLLM_CONFIG_ROOT": str(scratch / "vllm_config"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "PYTHONUNBUFFERED": "1",
    }
    if stage != "compiled":
        settings["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles some small functions of its own; not what is tried here
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(ROOT / "tests" / "support")])
    return {**settings, **os.environ, "PYTHONPATH": path}


def attempt(
    plan: argparse.Namespace, scratch: Path, name: str, backend: str, extra: dict[str, str]
) -> tuple[dict[str, Any] | None, str, str]:
    """Run a stage in a child: its result, or None; one line about it; its output."""
    result, log = scratch / f"{name}.json", scratch / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, f"--stage={name}", f"--backend={backend}", f"--model={scratch / 'model'}"]
    command += [f"--output={scratch}", f"--length={plan.length}", f"--batch={plan.batch}", f"--top-k={plan.top_k}"]
    command += [f"--host-memory-gib={plan.host_memory_gib}", *(["--cpu"] if plan.cpu else [])]
    limit, begin = LIMITS[name] * plan.patience, time.perf_counter()
    with log.open("w") as sink:
        # A process group of its own, so that nothing it started outlives the limit.
        child = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(scratch, name) | extra,
            start_new_session=True,
        )
        try:
            code: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)
            child.wait()
            code = f"over {limit:.0f} s"
    output, seconds = log.read_text(errors="replace"), time.perf_counter() - begin
    facts = json.loads(result.read_text()) if result.exists() else None
    head = f"{name:11} {'ok  ' if facts else 'FAIL'} {seconds:5.1f} s"
    if facts is None:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        return None, f"{head}  exit {code}: {last[:160]}", output
    hidden = ("tokens", "logprobs", "layers")
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in facts.items()
        if key not in hidden
    )
    return facts, f"{head}  {text}", output


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1, default=str))
    partial.replace(path)


def run_all(plan: argparse.Namespace) -> int:
    """Every chosen stage; returns how many failed."""
    plan.output.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu_vllm_"))
    write_model(scratch / "model", **(CPU_SHAPE if plan.cpu else GPU_SHAPE))
    results: dict[str, Any] = {}
    failed, dense_backend, extra = 0, FALLBACKS[0][0], {}
    with (plan.output / "vllm.log").open("w") as log:
        for name in plan.stages:
            tries = FALLBACKS if name == "dense" and not plan.cpu else ((dense_backend, extra),)
            for backend, more in tries:
                backend = "CPU_ATTN" if plan.cpu else backend
                facts, line, output = attempt(plan, scratch, name, backend, more if "dense" in name else {})
                print(line, flush=True)
                log.write(f"===== {name} {backend} {more}\n{output[-(2 << 20) :]}\n")
                log.flush()
                if facts is not None:
                    if name == "dense":
                        dense_backend, extra = backend, more
                    break
                print("\n".join(f"    {text[:240]}" for text in output.splitlines()[-30:]), flush=True)
                if name == "dense" and tries is FALLBACKS and "import" in results and results["import"] is None:
                    break
            failed += facts is None
            results[name] = facts
            write_json(plan.output / "vllm.json", results)
    shutil.rmtree(scratch, ignore_errors=True)
    if (dense := results.get("time_dense")) and (lrqk := results.get("time_lrqk")):
        print(f"step {dense['step_ms']:.3f} ms dense, {lrqk['step_ms']:.3f} ms LRQK at {plan.length} x {plan.batch}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=list(LIMITS), default=DEFAULT_STAGES)
    parser.add_argument("--cpu", action="store_true", help="try the script on vLLM's CPU platform, with tiny shapes")
    parser.add_argument("--length", type=int, help="prompt tokens of the timed stages (default 65536; 512 with --cpu)")
    parser.add_argument("--batch", type=int, help="requests of the timed stages (default 8; 2 with --cpu)")
    parser.add_argument("--top-k", type=int, help="of the timed stage (default 2048; 64 with --cpu)")
    parser.add_argument("--host-memory-gib", type=float, help="of the timed stage (default: what it needs)")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of the time limits")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    plan = parser.parse_args()
    plan.length = plan.length or (512 if plan.cpu else 65536)
    plan.batch = plan.batch or (2 if plan.cpu else 8)
    plan.top_k = plan.top_k or (64 if plan.cpu else 2048)
    if plan.host_memory_gib is None:
        shape = CPU_SHAPE if plan.cpu else GPU_SHAPE
        row_bytes = shape["layers"] * shape["kv_heads"] * shape["head_size"] * 2 * 2
        plan.host_memory_gib = round((plan.length + 1024) * plan.batch * row_bytes * 1.05 / 2**30 + 0.05, 3)
    if plan.stage:
        facts = run_stage(plan)
        write_json(plan.output / f"{plan.stage}.json", facts)
        return
    sys.exit(run_all(plan))


if __name__ == "__main__":
    main()
