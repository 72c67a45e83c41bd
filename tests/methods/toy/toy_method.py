"""Dense attention over rows in vLLM's own pages, as a method: what the seam between methods and vLLM asks for."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vllm_lrqk.core.config import ConfigError, Settings
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer, LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.method import MemoryPlan, Method, ModelFacts
from vllm_lrqk.core.step import PrefillChunk, Step


@dataclass(frozen=True, kw_only=True)
class ToySettings(Settings):
    key: ClassVar[str] = "toy"

    block_size: int = field(default=32, metadata={"choices": (16, 32, 64)})
    longest: int = field(default=4096, metadata={"minimum": 1})


class Toy(Method):
    name = "TOY"
    settings_type = ToySettings
    block_size_setting = "toy.block_size"
    tallies: ClassVar[tuple[str, ...]] = ("rows_read",)

    def check(self, model: ModelFacts) -> None:
        if model.max_model_len > self.settings.longest:
            raise ConfigError(f"toy.longest is {self.settings.longest}, but --max-model-len is larger: raise it.")

    def plan(self, head_size: int, dtype: torch.dtype, group: int) -> MemoryPlan:
        return MemoryPlan(self.settings.block_size, 2 * head_size * dtype.itemsize, is_paged=True)

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
        assert memory.blocks is not None
        rows = memory.blocks.view(shape.torch_dtype)
        rows = rows.unflatten(-1, (self.settings.block_size, 2, shape.head_size))
        return ToyLayer(rows, shape.scale, tallies)


class ToyLayer(Layer):
    """Rows [num_blocks, KV, N, 2, d]: keys at 0, values at 1."""

    def __init__(self, rows: torch.Tensor, scale: float, tallies: torch.Tensor) -> None:
        self.rows, self.scale, self.tallies = rows, scale, tallies

    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        slot_mapping, size = step.slot_mapping, self.rows.shape[2]
        self.rows[slot_mapping // size, :, slot_mapping % size] = torch.stack([key, value], 2)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        self._attend(query, chunk.pages, chunk.context_len, output)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        for row, length in enumerate(seq_lens.tolist()):
            self._attend(query[row : row + 1], block_table[row], length - 1, output[row : row + 1])

    def _attend(self, query: torch.Tensor, pages: torch.Tensor, context_len: int, output: torch.Tensor) -> None:
        """Causal attention of the last tokens [t, H, d] of a request."""
        length, (kv_heads, size) = context_len + len(query), self.rows.shape[1:3]
        rows = self.rows[pages[: -(-length // size)].long()].transpose(0, 1).flatten(1, 2)[:, :length]
        rows = rows.repeat_interleave(query.shape[1] // kv_heads, 0).float()  # [H, length, 2, d]
        scores = query.transpose(0, 1).float() @ rows[:, :, 0].mT * self.scale
        future = torch.ones(len(query), length, dtype=torch.bool).triu(context_len + 1)
        output.copy_((scores.masked_fill(future, -torch.inf).softmax(-1) @ rows[:, :, 1]).transpose(0, 1))
        self.tallies[0] += length * kv_heads
