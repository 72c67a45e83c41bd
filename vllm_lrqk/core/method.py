"""What a method is: attention with its own settings, memory and layers, under a backend name of its own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vllm_lrqk.core.config import Settings
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer, LayerMemory, LayerPlace, LayerShape


@dataclass(frozen=True)
class MemoryPlan:
    """What one layer needs of vLLM's pool of blocks, for each KV head.

    A block takes `block_size` times `bytes_per_token` bytes, whether it holds tokens or belongs to a request.
    """

    block_size: int
    bytes_per_token: int
    is_paged: bool
    """Whether blocks hold tokens: a request takes one for every `block_size` of them."""
    blocks_per_request: int = 0
    """Blocks that a request owns, however many tokens it has."""
    host_bytes_per_token: int = 0
    """Bytes in CPU memory beside each paged block, for every token of it."""

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one decode step moves for one request, for each KV head of each layer."""

    device_bytes: int
    """Read from the device's memory."""
    host_bytes: int = 0
    """Fetched from the host's, if nothing is found in a cache of rows."""


@dataclass(frozen=True)
class ModelFacts:
    """What a method may ask of a model and its engine before anything is loaded."""

    name: str
    head_size: int
    heads: int
    """Query heads of all ranks."""
    kv_heads: int
    """Key and value heads of all ranks."""
    max_model_len: int
    config: Mapping[str, Any]
    """Of the text model, as transformers writes it."""


class Method(ABC):
    """One method with the settings of one engine; travels with vLLM's configuration to every process.

    Args:
        settings: of this method.
        device_type: "cpu" or "cuda".
    """

    name: ClassVar[str]
    """The backend's name."""
    settings_type: ClassVar[type[Settings]]
    block_size_setting: ClassVar[str]
    """The setting, with its key, that vLLM's block size follows."""
    serves_windows: ClassVar[bool] = False
    """Whether layers with a sliding window may stand beside its own, which are served exactly."""
    serves_drafts: ClassVar[bool] = False
    """Whether tokens that were drafted and rejected leave nothing behind: what a step stores is written over."""
    serves_caps_and_sinks: ClassVar[bool] = False
    """Whether its layers follow `Layer.logits`: soft caps and learned sinks."""
    tallies: ClassVar[tuple[str, ...]] = ()
    """Names of what its kernels count on the device."""

    def __init__(self, settings: Any, device_type: str) -> None:
        self.settings = settings
        self.device_type = device_type

    @property
    def host_memory_gib(self) -> float | None:
        """CPU memory that the settings ask for, for methods whose plan has a host tier; None: a default share."""
        return None

    def check(self, model: ModelFacts) -> None:
        """Refuse models and settings that cannot be served. Raises ConfigError: the first thing found."""

    def check_machine(self) -> None:
        """Refuse a machine, or an installation, that lacks something. Raises ConfigError."""

    def traffic(self, plan: MemoryPlan, length: int, head_size: int, dtype: torch.dtype) -> StepTraffic:
        """What a decode step moves at so many tokens; a request's whole memory unless the method says less.

        Args:
            plan: of the same head size and type of keys and values.
        """
        if plan.is_paged:
            return StepTraffic(length * plan.bytes_per_token)
        return StepTraffic(plan.block_bytes * plan.blocks_per_request)

    @property
    def variant(self) -> str:
        """What of the method is served, in the start-up line beside the kernels; may be empty."""
        return ""

    @abstractmethod
    def plan(self, head_size: int, dtype: torch.dtype, group: int) -> MemoryPlan:
        """What a layer needs.

        Args:
            dtype: of its keys and values.
            group: query heads per KV head.
        """

    def make_workspace(self, shape: LayerShape, max_requests: int, max_model_len: int, device: torch.device) -> Any:
        """Memory of decode steps that all layers of one shape share; taken before vLLM profiles, so that it counts."""
        return None

    @abstractmethod
    def make_layer(
        self,
        shape: LayerShape,
        place: LayerPlace,
        memory: LayerMemory,
        workspace: Any,
        counters: Counters,
        tallies: torch.Tensor,
        device: torch.device,
    ) -> Layer:
        """One layer.

        Args:
            workspace: as `make_workspace` gave it.
            tallies: int64 [tallies], the layer's row of `counters.tallies`.
        """

    def count(self, counts: dict[str, int], kv_heads: int, row_bytes: int) -> dict[str, int]:
        """What is reported: `counts` with what follows from them.

        Args:
            kv_heads: of each layer.
            row_bytes: of one token's key and value in one KV head.
        """
        return counts

    def describe(self, recent: dict[str, int], seconds: float) -> str:
        """What happened in the last `seconds`, for the log."""
        return ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in recent.items())
