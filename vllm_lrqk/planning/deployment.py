"""The machine and the limits that are planned for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.methods import METHODS
from vllm_lrqk.planning.model import ModelShape

STEP_TOKENS = 2048
"""Of one step of a server on the CPU platform, for each rank, where vLLM is told nothing."""


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
    max_num_batched_tokens: int | None = None
    """Of one step, which windows reserve blocks for; None: vLLM's default of a server on the CPU platform."""

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def step_tokens(self) -> int:
        """Tokens of one step at most."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return min(STEP_TOKENS * self.ranks, self.max_num_seqs * self.max_model_len)


def check(model: ModelShape, deployment: Deployment, settings: Mapping[str, Any]) -> None:
    """Refuse what no engine starts with.

    Args:
        settings: as of `make_plans`.

    Raises:
        ConfigError: the first value that is not allowed.
    """
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
    if deployment.max_num_batched_tokens is not None and deployment.max_num_batched_tokens < deployment.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens is {deployment.max_num_batched_tokens}, but must be at least --max-num-seqs, "
            f"{deployment.max_num_seqs}."
        )
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
