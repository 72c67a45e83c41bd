"""AQUA as a method: what it refuses, the memory it needs, and its layers."""

from typing import Any

import torch

from vllm_lrqk.core.calibration import CalibrationSource, ModelIdentity
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.method import MemoryPlan, Method, ModelFacts, StepTraffic
from vllm_lrqk.methods.aqua import cpu
from vllm_lrqk.methods.aqua.basis import make_basis
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.layer import AquaLayer
from vllm_lrqk.methods.aqua.settings import AquaSettings


class Aqua(Method):
    """All keys and values on the device; decode steps score with the dimensions that matter to their queries."""

    name = "AQUA"
    settings_type = AquaSettings
    block_size_setting = "aqua.block_size"
    serves_drafts = True
    settings: AquaSettings

    def check(self, model: ModelFacts) -> None:
        if self.device_type != "cpu":
            raise ConfigError("AQUA runs on the CPU only: serve this model with another attention backend.")
        self._calibration = CalibrationSource("aqua.calibration", self.settings.calibration, ModelIdentity.of(model))
        self._calibration.open()

    def plan(self, head_size: int, dtype: torch.dtype, group: int) -> MemoryPlan:
        config = self.settings
        form = BlockFormat.from_config(config, config.block_size, head_size, dtype)
        return MemoryPlan(config.block_size, form.bytes_per_token, is_paged=True)

    def traffic(self, plan: MemoryPlan, length: int, head_size: int, dtype: torch.dtype) -> StepTraffic:
        value_bytes = head_size * dtype.itemsize
        kept, stored = self.settings.num_kept(head_size), self.settings.num_stored(head_size)
        return StepTraffic(length * (value_bytes + (plan.bytes_per_token - value_bytes) * kept // stored))

    def make_layer(
        self,
        shape: LayerShape,
        place: LayerPlace,
        memory: LayerMemory,
        workspace: Any,
        counters: Counters,
        tallies: torch.Tensor,
        device: torch.device,
    ) -> AquaLayer:
        assert memory.blocks is not None
        config = self.settings
        form = BlockFormat.from_config(config, config.block_size, shape.head_size, shape.torch_dtype)
        moments = self._calibration.open().moments(place, shape.kv_heads)
        basis = make_basis(moments.query, moments.key, moments.key_mean, form.stored).to(device)
        return AquaLayer(Blocks(memory.blocks, form), basis, shape.scale, config, cpu.kernels())
