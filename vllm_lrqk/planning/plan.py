"""What each method has room for on a machine that need not be this one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_lrqk.core.capacity import Capacity, HostTier, backed_blocks
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.host_memory import GIB
from vllm_lrqk.core.method import MemoryPlan, Method
from vllm_lrqk.core.model_heads import rank_heads
from vllm_lrqk.core.window_checks import check_windows
from vllm_lrqk.core.windows import WindowLayers, plan_windows, windows_beside
from vllm_lrqk.methods import METHODS, method_class
from vllm_lrqk.planning.deployment import Deployment, check
from vllm_lrqk.planning.model import ModelShape

DENSE = "dense"
DENSE_BLOCK = 16
"""Tokens of a block of vLLM's own backends."""
OTHER = "serve it with another attention backend."


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
    window_bytes_per_request: int = 0
    """Of layers with a sliding window beside a method's, which lie in the memory for keys and values."""

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
            "window_bytes_per_request": self.window_bytes_per_request,
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
    check(model, deployment, settings)
    methods = []
    for name in METHODS:
        found = method_class(name)
        values = dict(settings.get(found.settings_type.key, {}))
        if "host_memory_gib" in (item.name for item in fields(found.settings_type)):
            values.setdefault("host_memory_gib", deployment.host_memory_gib)
        methods.append(found(found.settings_type.from_dict(values), deployment.device_type))
    return [_dense(model, deployment), *(_plan(model, deployment, method) for method in methods)]


def heads_of(kv_heads: Sequence[int], deployment: Deployment) -> int:
    """KV heads of all layers of the rank with most.

    Args:
        kv_heads: of each layer.
    """
    return rank_heads(kv_heads, deployment.tensor_parallel, even_stages(len(kv_heads), deployment.pipeline_parallel))


def window_layers(model: ModelShape, deployment: Deployment) -> WindowLayers | None:
    """The layers of a rank with a sliding window; None where there are none."""
    if model.window is None:
        return None
    layers = [count for count, own in zip(model.kv_heads, model.full_kv_heads) if count and not own]
    heads = max(1, max(layers) // deployment.tensor_parallel)
    return WindowLayers(model.window, len(layers), heads * _row_bytes(model))


def _row_bytes(model: ModelShape) -> int:
    """Of one token's key and value in one KV head."""
    return 2 * model.head_size * model.dtype.itemsize


def even_stages(layers: int, stages: int) -> list[tuple[int, int]]:
    """First and past-the-last layer of each pipeline stage as vLLM cuts them: what is over goes before the last."""
    sizes = [layers // stages] * stages
    for number in range(2, layers % stages + 2):
        sizes[-number] += 1
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [(start, start + size) for start, size in zip(starts, sizes)]


def _dense(model: ModelShape, deployment: Deployment) -> Plan:
    row_bytes, windows = _row_bytes(model), window_layers(model, deployment)
    length, heads = deployment.max_model_len, heads_of(model.kv_heads, deployment)
    seconds = heads * length * row_bytes / deployment.device_bandwidth
    plan, widest = MemoryPlan(DENSE_BLOCK, row_bytes, is_paged=True), 0
    if windows is not None:  # a window is what a request takes of its layers, however many tokens it has
        heads = heads_of(model.full_kv_heads, deployment)
        seconds = heads * length * row_bytes / deployment.device_bandwidth + _window_seconds(windows, deployment)
        beside = plan_windows(windows, heads * plan.block_bytes, DENSE_BLOCK)
        plan, widest = replace(plan, blocks_per_request=beside.blocks_of(beside.window)), beside.block_bytes
    memory = deployment.device_memory_gib
    if deployment.device_type == "cpu":  # keys and values may take all of it
        memory = deployment.host_memory_gib / deployment.ranks + (memory or 0)
    assert memory is not None
    room = Capacity(plan, heads, row_bytes, 0, None, deployment.max_num_seqs, widest)
    room = replace(room, num_blocks=int(memory * GIB) // room.block_bytes)
    return Plan(DENSE, room, length, seconds, None, None)


def _window_seconds(windows: WindowLayers, deployment: Deployment) -> float:
    tokens = min(windows.window, deployment.max_model_len)
    return windows.layers * tokens * windows.bytes_per_token / deployment.device_bandwidth


def _plan(model: ModelShape, deployment: Deployment, method: Method) -> Plan:
    plan, length = method.plan(model.head_size, model.dtype, model.group), deployment.max_model_len
    layers, refused, room = window_layers(model, deployment), None, None
    seconds, window_bytes = 0.0, 0
    try:
        if layers is not None:
            check_windows(method, model.name, layers.window, model.layer_types, deployment.pipeline_parallel, OTHER)
            room, window_bytes = _beside_windows(model, deployment, plan, layers)
            seconds = _window_seconds(layers, deployment)
        method.check(model.facts(length))
    except ConfigError as error:
        refused = str(error)
    if room is None:
        room = _capacity(model, deployment, plan)
    if refused is None and room.requests(length) == 0:
        refused = f"Not one request of {length} tokens fits: {room.limit(length)} is too small."
    traffic = method.traffic(plan, length, model.head_size, model.dtype)
    seconds += room.heads * (
        traffic.device_bytes / deployment.device_bandwidth + traffic.host_bytes / deployment.host_bandwidth
    )
    command = None if refused else _command(model, deployment, method)
    return Plan(method.name, room, length, seconds, refused, command, window_bytes)


def _rank_memory(deployment: Deployment) -> int:
    """Bytes of the host for one rank."""
    return int(deployment.host_memory_gib * GIB) // deployment.ranks


def _capacity(model: ModelShape, deployment: Deployment, plan: MemoryPlan) -> Capacity:
    """Where all layers are the method's."""
    heads = heads_of(model.kv_heads, deployment)
    host = HostTier.of(plan, heads, _rank_memory(deployment))
    if deployment.device_memory_gib is not None:
        blocks = int(deployment.device_memory_gib * GIB) // (heads * plan.block_bytes)
    elif host is not None:
        blocks = backed_blocks(plan, host, deployment.max_num_seqs)
    else:
        blocks = _rank_memory(deployment) // (heads * plan.block_bytes)
    pages = None if host is None else min(host.num_pages, blocks)
    return Capacity(plan, heads, _row_bytes(model), blocks, pages, deployment.max_num_seqs)


def _beside_windows(
    model: ModelShape, deployment: Deployment, plan: MemoryPlan, layers: WindowLayers
) -> tuple[Capacity, int]:
    """Where windows take their part of the host's memory and of the pool, and what a request's windows take."""
    heads, requests, pool = heads_of(model.full_kv_heads, deployment), deployment.max_num_seqs, None
    if deployment.device_memory_gib is not None:
        pool = int(deployment.device_memory_gib * GIB)
    shape = layers, plan, heads, _rank_memory(deployment)
    windows, host = windows_beside(*shape, requests, deployment.step_tokens, pool)
    own = len(windows.blocks)
    blocks = backed_blocks(plan, host, requests) + own if pool is None else pool // windows.plan.block_bytes
    rest = requests, windows.plan.block_bytes, own, windows.requests
    room = Capacity(plan, heads, _row_bytes(model), blocks, min(host.num_pages, blocks - own), *rest)
    return room, windows.bytes_per_request


def _command(model: ModelShape, deployment: Deployment, method: Method) -> str:
    changed = method.settings.changed()
    parts = [f"vllm serve {model.name} --attention-backend {method.name}"]
    parts.append(f"--max-model-len {deployment.max_model_len} --max-num-seqs {deployment.max_num_seqs}")
    for flag, value in (("tensor", deployment.tensor_parallel), ("pipeline", deployment.pipeline_parallel)):
        if value > 1:
            parts.append(f"--{flag}-parallel-size {value}")
    if model.window is not None:
        parts.append(f"--max-num-batched-tokens {deployment.step_tokens}")
    memory = deployment.device_memory_gib
    if memory is None and "host_memory_gib" not in changed:  # vLLM sizes the pool of a method without a host tier
        memory = deployment.host_memory_gib / deployment.ranks
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
