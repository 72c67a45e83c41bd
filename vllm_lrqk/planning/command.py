"""`vllm-lrqk plan`: what fits, from a model's config.json alone.

vllm-lrqk plan MODEL --device-memory 20 --host-memory 200 --max-model-len 131072
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import DEFAULT_SHARE, GIB, host_memory
from vllm_lrqk.planning.deployment import Deployment
from vllm_lrqk.planning.model import read_model
from vllm_lrqk.planning.plan import make_plans

BANDWIDTHS = {"cuda": (3350.0, 50.0), "cpu": (50.0, 50.0)}
"""GB/s of the device's memory (of an H100's) and of its way to the host's (PCIe 5), where none are given."""
WIDTH = 120


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lrqk plan", description="What each method has room for. Reads config.json; starts nothing."
    )
    add = parser.add_argument
    add("model", help="folder or name of a model")
    add(
        "--device", choices=sorted(BANDWIDTHS), default="cuda", help="what serves; default cuda, which need not be here"
    )
    add("--device-memory", type=float, metavar="GIB", help="of a rank, for the KV cache (--kv-cache-memory-bytes)")
    add("--host-memory", type=float, metavar="GIB", help="of a host, all ranks; default: half of what is free here")
    add("--max-model-len", type=int, help="tokens of a request; default: what the model was made for")
    add("--max-num-seqs", type=int, default=16, help="requests at once; default 16")
    add("--max-num-batched-tokens", type=int, help="of one step, for sliding windows; default: a server's on the CPU")
    add("--tensor-parallel-size", type=int, default=1)
    add("--pipeline-parallel-size", type=int, default=1)
    add("--dtype", default="auto", help="as of vLLM")
    add("--additional-config", type=_settings, default={}, metavar="JSON", help="settings of the methods, as of vLLM")
    add("--device-bandwidth", type=float, metavar="GB/s", help="of the device's memory, for the estimate of a step")
    add("--host-bandwidth", type=float, metavar="GB/s", help="between device and host")
    add("--json", action="store_true", help="figures as JSON instead of the table")
    add("--plot", type=Path, metavar="FILE", help="requests over their length, as PNG, SVG or PDF")
    return parser


def _settings(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object such as {{"lrqk": {{"top_k": 1024}}}}')
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, that of the process if none is given; ends the process with a sentence if it is wrong."""
    parsed = make_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(parsed)
    except ConfigError as error:
        raise SystemExit(f"vllm-lrqk plan: {error}") from error


def _run(parsed: argparse.Namespace) -> None:
    model = read_model(parsed.model, parsed.dtype)
    device_bandwidth, host_bandwidth = BANDWIDTHS[parsed.device]
    deployment = Deployment(
        parsed.device,
        parsed.device_memory,
        host_memory().free_bytes * DEFAULT_SHARE / GIB if parsed.host_memory is None else parsed.host_memory,
        model.context if parsed.max_model_len is None else parsed.max_model_len,
        parsed.max_num_seqs,
        parsed.tensor_parallel_size,
        parsed.pipeline_parallel_size,
        1e9 * (device_bandwidth if parsed.device_bandwidth is None else parsed.device_bandwidth),
        1e9 * (host_bandwidth if parsed.host_bandwidth is None else parsed.host_bandwidth),
        parsed.max_num_batched_tokens,
    )
    plans = make_plans(model, deployment, parsed.additional_config)
    if parsed.plot is not None:
        from vllm_lrqk.planning.plot import plot

        plot(plans, model.name, parsed.plot)
    if parsed.json:
        print(json.dumps([plan.as_dict() for plan in plans], indent=1))
        return
    from rich.console import Console

    from vllm_lrqk.planning.report import table

    console = Console(highlight=False, soft_wrap=False)
    console.width = console.width if console.is_terminal else WIDTH
    console.print(table(plans, deployment))
    for plan in plans:
        text = plan.refused or plan.command
        if text:
            print(f"\n{plan.method}: {text}")
    if parsed.plot is not None:
        print(f"\nThe plot is {parsed.plot}.")
