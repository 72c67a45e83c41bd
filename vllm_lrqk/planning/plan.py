"""What each method has room for on a machine that need not be this one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm_lrqk.core.capacity import Capacity, HostTier, backed_blocks
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import GIB
from vllm_lrqk.core.method import MemoryPlan, Method
from vllm_lrqk.core.model_heads import rank_heads
from vllm_lrqk.methods import METHODS, method_class
from vllm_lrqk.planning.model import ModelShape

DENSE = "dense"
DENSE_BLOCK = 16
"""Tokens of a block of vLLM's own backends."""


@dataclass(frozen=True)
class Deployment:
    """What is planned for.

    Args:
        device_type: "cuda" or "cpu".
        device_memory_gib: for the KV cache of one rank (vLLM's `--kv-cache-memory-bytes`); None, on the CPU only:
            as much as the host tier can back, which is what an engine takes.
        host_memory_gib: of one host, all ranks together.
        device_bandwidth, host_bandwidth: bytes per second, of the device's memory and of its way to the host's.
    """

    device_type: str
    device_memory_gib: float | None
    host_memory_gib: float
    max_model_len: int
    max_num_seqs: int
    tensor_parallel: int
    pipeline_parallel: int
    device_bandwidth: float
    host_bandwidth: float


@dataclass(frozen=True)
class Plan:
    """One method on a deployment; dense attention is one as well."""

    method: str
    capacity: Capacity
    length: int
    """Tokens of a request, for `requests` and `limit`."""
    step_seconds: float
    """Of one request's attention in one decode step at that length, all layers: bytes over bandwidths, an estimate."""
    refused: str | None
    """Why an engine would not start so; None: it would."""
    command: str | None

    @property
    def requests(self) -> int:
        return self.capacity.requests(self.length)

    def as_dict(self) -> dict[str, Any]:
        """The figures, for `--json`."""
        room = self.capacity
        return {
            "method": self.method,
            "device_bytes_per_token": room.device_bytes_per_token,
            "device_bytes_per_request": room.device_bytes_per_request,
            "host_bytes_per_token": room.host_bytes_per_token,
            "requests": self.requests,
            "limit": room.limit(self.length),
            "tokens": room.tokens(self.length),
            "device_tokens": room.device_tokens if room.plan.is_paged else None,
            "host_tokens": room.host_tokens,
            "dense_tokens_in_device_memory": room.dense_tokens,
            "blocks": room.num_blocks,
            "step_seconds_estimate": self.step_seconds,
            "refused": self.refused,
            "command": self.command,
        }


def make_plans(model: ModelShape, deployment: Deployment, settings: Mapping[str, Any]) -> list[Plan]:
    """Dense attention and every method.

    Args:
        settings: of the methods, as vLLM's `additional_config`.

    Raises:
        ConfigError: a setting or a value of the deployment is not allowed.
    """
    _check(model, deployment, settings)
    methods = []
    for name in METHODS:
        found = method_class(name)
        values = dict(settings.get(found.settings_type.key, {}))
        if "host_memory_gib" in (item.name for item in fields(found.settings_type)):
            values.setdefault("host_memory_gib", deployment.host_memory_gib)
        methods.append(found(found.settings_type.from_dict(values), deployment.device_type))
    return [_dense(model, deployment), *(_plan(model, deployment, method) for method in methods)]


def _check(model: ModelShape, deployment: Deployment, settings: Mapping[str, Any]) -> None:
    for flag, value in (
        ("--max-model-len", deployment.max_model_len),
        ("--max-num-seqs", deployment.max_num_seqs),
        ("--tensor-parallel-size", deployment.tensor_parallel),
        ("--pipeline-parallel-size", deployment.pipeline_parallel),
        ("--host-memory", deployment.host_memory_gib),
        ("--device-bandwidth", deployment.device_bandwidth),
        ("--host-bandwidth", deployment.host_bandwidth),
    ):
        if value <= 0:
            raise ConfigError(f"{flag} is {value:g}, but must be above 0.")
    if deployment.device_memory_gib is not None and deployment.device_memory_gib <= 0:
        raise ConfigError(f"--device-memory is {deployment.device_memory_gib:g}, but must be above 0.")
    if deployment.device_memory_gib is None and deployment.device_type != "cpu":
        raise ConfigError("--device-memory is missing: say how many GiB of a device are for the KV cache.")
    if model.heads % deployment.tensor_parallel:
        raise ConfigError(
            f"--tensor-parallel-size is {deployment.tensor_parallel}, but must divide the {model.heads} query heads "
            f"of {model.name}."
        )
    if deployment.pipeline_parallel > len(model.kv_heads):
        raise ConfigError(
            f"--pipeline-parallel-size is {deployment.pipeline_parallel}, but {model.name} has "
            f"{len(model.kv_heads)} layers: lower it."
        )
    keys = {name.lower() for name in METHODS}
    for key in settings:
        if key not in keys:
            raise ConfigError(f"--additional-config has {key!r}, which is no method's: use {', '.join(sorted(keys))}.")


def heads_of(model: ModelShape, deployment: Deployment) -> int:
    """KV heads of all layers of the rank with most."""
    layers, stages = len(model.kv_heads), deployment.pipeline_parallel
    return rank_heads(model.kv_heads, deployment.tensor_parallel, even_stages(layers, stages))


def even_stages(layers: int, stages: int) -> list[tuple[int, int]]:
    """First and past-the-last layer of each pipeline stage as vLLM cuts them: what is over goes before the last."""
    sizes = [layers // stages] * stages
    for number in range(2, layers % stages + 2):
        sizes[-number] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [(start, start + size) for start, size in zip(starts, sizes)]


def _dense(model: ModelShape, deployment: Deployment) -> Plan:
    row_bytes = 2 * model.head_size * model.dtype.itemsize
    plan = MemoryPlan(DENSE_BLOCK, row_bytes, is_paged=True)
    heads = heads_of(model, deployment)
    memory = deployment.device_memory_gib
    if deployment.device_type == "cpu":  # keys and values may take all of it
        memory = deployment.host_memory_gib / _ranks(deployment) + (memory or 0)
    assert memory is not None
    blocks = int(memory * GIB) // (heads * plan.block_bytes)
    room = Capacity(plan, heads, row_bytes, blocks, None, deployment.max_num_seqs)
    length = deployment.max_model_len
    seconds = heads * length * row_bytes / deployment.device_bandwidth
    return Plan(DENSE, room, length, seconds, None, None)


def _ranks(deployment: Deployment) -> int:
    return deployment.tensor_parallel * deployment.pipeline_parallel


def _plan(model: ModelShape, deployment: Deployment, method: Method) -> Plan:
    plan = method.plan(model.head_size, model.dtype, model.group)
    heads = heads_of(model, deployment)
    host = HostTier.of(plan, heads, int(deployment.host_memory_gib * GIB) // _ranks(deployment))
    blocks = _num_blocks(deployment, plan, heads, host)
    pages = None if host is None else min(host.num_pages, blocks)
    row_bytes = 2 * model.head_size * model.dtype.itemsize
    room = Capacity(plan, heads, row_bytes, blocks, pages, deployment.max_num_seqs)
    refused = None
    try:
        method.check(model.facts(deployment.max_model_len))
    except ConfigError as error:
        refused = str(error)
    if refused is None and room.requests(deployment.max_model_len) == 0:
        limit = room.limit(deployment.max_model_len)
        refused = f"Not one request of {deployment.max_model_len} tokens fits: {limit} is too small."
    traffic = method.traffic(plan, deployment.max_model_len, model.head_size, model.dtype)
    seconds = heads * (
        traffic.device_bytes / deployment.device_bandwidth + traffic.host_bytes / deployment.host_bandwidth
    )
    command = None if refused else _command(model, deployment, method)
    return Plan(method.name, room, deployment.max_model_len, seconds, refused, command)


def _num_blocks(deployment: Deployment, plan: MemoryPlan, heads: int, host: HostTier | None) -> int:
    if deployment.device_memory_gib is not None:
        return int(deployment.device_memory_gib * GIB) // (heads * plan.block_bytes)
    if host is not None:
        return backed_blocks(plan, host, deployment.max_num_seqs)
    return int(deployment.host_memory_gib * GIB) // _ranks(deployment) // (heads * plan.block_bytes)


def _command(model: ModelShape, deployment: Deployment, method: Method) -> str:
    changed = method.settings.changed()
    parts = [f"vllm serve {model.name} --attention-backend {method.name}"]
    parts.append(f"--max-model-len {deployment.max_model_len} --max-num-seqs {deployment.max_num_seqs}")
    for flag, value in (("tensor", deployment.tensor_parallel), ("pipeline", deployment.pipeline_parallel)):
        if value > 1:
            parts.append(f"--{flag}-parallel-size {value}")
    memory = deployment.device_memory_gib
    if memory is None and "host_memory_gib" not in changed:  # vLLM sizes the pool of a method without a host tier
        memory = deployment.host_memory_gib / _ranks(deployment)
    if memory is not None:
        parts.append(f"--kv-cache-memory-bytes {int(memory * GIB)}")
    if changed:
        parts.append(f"--additional-config '{json.dumps({method.settings.key: changed})}'")
    return " ".join(parts)


def lengths_up_to(longest: int, least: int = 1024) -> Sequence[int]:
    """Lengths of contexts for a plot: doubling, up to the longest."""
    found = []
    length = min(least, longest)
    while length < longest:
        found.append(length)
        length *= 2
    return [*found, longest]
