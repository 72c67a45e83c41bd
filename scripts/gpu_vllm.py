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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_vllm_model import CPU_SHAPE, GPU_SHAPE, write_model
from gpu_vllm_stages import run_stage

ROOT = Path(__file__).resolve().parents[1]
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


def environment(scratch: Path, stage: str) -> dict[str, str]:
    """Of a child: in this process alone, without network, caches that go with the run."""
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # flashinfer is not in the archive
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
