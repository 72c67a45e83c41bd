"""LoLA as a method: what it refuses, the memory it needs, and its layers."""

from typing import Any

import torch

from vllm_lrqk.core.calibration import CalibrationSource, ModelIdentity
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.method import MemoryPlan, Method, ModelFacts
from vllm_lrqk.methods.lola.directions import Directions, Rotary, calibrated_directions, slow_directions
from vllm_lrqk.methods.lola.layer import LolaLayer, memory
from vllm_lrqk.methods.lola.settings import LolaSettings

BLOCK_SIZE = 64
"""Tokens that vLLM counts per block. A request owns one block, however many tokens it has; every `block_bytes` is a
multiple of this."""


class Lola(Method):
    """Window, sparse cache and state: constant memory per request."""

    name = "LOLA"
    settings_type = LolaSettings
    block_size_setting = "lola.chunk"
    settings: LolaSettings
    _calibration: CalibrationSource | None = None
    _rotary: Rotary | None = None

    def check(self, model: ModelFacts) -> None:
        memory(self.settings, model.head_size, torch.float32, model.heads // model.kv_heads)
        if self.device_type != "cpu" and self.settings.state == "hedgehog":
            raise ConfigError(
                'lola.state is "hedgehog", but only the CPU platform serves it: set it to "slope" or "none".'
            )
        self._rotary = Rotary.of(model.config, model.head_size)
        if self.settings.directions is not None:
            identity = ModelIdentity.of(model)
            self._calibration = CalibrationSource("lola.directions", self.settings.directions, identity)
            self._calibration.open()

    def plan(self, head_size: int, dtype: torch.dtype, group: int) -> MemoryPlan:
        size = memory(self.settings, head_size, dtype, group)
        return MemoryPlan(BLOCK_SIZE, size // BLOCK_SIZE, is_paged=False, blocks_per_request=1)

    def make_layer(
        self,
        shape: LayerShape,
        place: LayerPlace,
        memory: LayerMemory,
        workspace: Any,
        counters: Counters,
        tallies: torch.Tensor,
        device: torch.device,
    ) -> LolaLayer:
        assert memory.request_blocks is not None
        return LolaLayer(memory.request_blocks, shape, self.settings, place, self._directions(shape, place))

    def _directions(self, shape: LayerShape, place: LayerPlace) -> Directions:
        rank = self.settings.state_rank
        if self._calibration is None:
            rotary = self._rotary or Rotary(shape.head_size)
            return slow_directions(shape.kv_heads, shape.head_size, min(rank, shape.head_size), rotary)
        moments = self._calibration.open().moments(place, shape.kv_heads)
        return calibrated_directions(moments.query, moments.key, moments.key_mean, rank)
