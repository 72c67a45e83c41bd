"""One attention layer under LoLA: what its memory takes, and its part of a forward step."""

import torch

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import Layer, LayerPlace, LayerShape
from vllm_lrqk.core.step import PrefillChunk, Step
from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.lola.attention import Rules
from vllm_lrqk.methods.lola.cpu import vector_size
from vllm_lrqk.methods.lola.directions import Directions, Rotary, slow_directions
from vllm_lrqk.methods.lola.dispatch import kernels_for
from vllm_lrqk.methods.lola.feature_maps import load_feature_maps, map_shapes
from vllm_lrqk.methods.lola.format import Memory, MemoryFormat
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import HedgehogState, NoState, SlopeState, State


def memory(settings: LolaSettings, head_size: int, dtype: torch.dtype, group: int = 1) -> int:
    """Bytes of one request's memory per KV head and layer.

    Args:
        dtype: of keys and values.
        group: query heads per KV head; matters for feature maps whose keys have a map per query head.

    Raises:
        ConfigError: the settings do not suit this head size, or the file of feature maps cannot be used.
    """
    memory_format, copies = _format(settings, head_size, dtype, group)
    return memory_format.block_bytes * copies


def _format(settings: LolaSettings, head_size: int, dtype: torch.dtype, group: int) -> tuple[MemoryFormat, int]:
    """The format of one head of the memory, and how many of them a KV head has."""
    if settings.state == "slope" and settings.state_rank > head_size:
        raise ConfigError(
            f"lola.state_rank is {settings.state_rank}, but must be at most the model's head size, {head_size}."
        )
    if settings.feature_maps is None:
        return MemoryFormat(settings, head_size, dtype), 1
    query_shape, key_shape = map_shapes(settings.feature_maps)
    copies = group if key_shape[0] == query_shape[0] else 1
    return MemoryFormat(settings, head_size, dtype, 2 * query_shape[-1]), copies


class LolaLayer(Layer):
    """Memory and rules of one layer; a request owns one block.

    Args:
        raw: uint8 [num_blocks, KV, memory(...) or more], any content; the last dimension contiguous.
        directions: of the slope state; None: the dimensions that RoPE turns slowest, in Llama's style.

    Raises:
        ConfigError: the file of feature maps cannot be used for this model.
    """

    def __init__(
        self,
        raw: torch.Tensor,
        shape: LayerShape,
        settings: LolaSettings,
        place: LayerPlace,
        directions: Directions | None = None,
    ) -> None:
        kv_heads = shape.kv_heads
        memory_format, copies = _format(settings, shape.head_size, shape.torch_dtype, shape.group)
        raw = raw[..., : copies * memory_format.block_bytes]
        if copies > 1:
            raw = raw.unflatten(-1, (copies, memory_format.block_bytes))
            raw = raw.view(len(raw), kv_heads * copies, memory_format.block_bytes)
        self.memory = Memory(raw, memory_format)
        self.rules = Rules(settings, _state(settings, shape, place, directions, raw.device), shape.scale)
        self.kernels = kernels_for(raw.device)
        self.kernels_name = self.kernels.name
        if shape.torch_dtype not in cpu.DTYPES:
            self.kernels_name = cpu.served_name(self.kernels.name, None)
        else:
            size = vector_size(memory_format)
            self.kernels_name = cpu.name_for(self.kernels.name, size)
            by_head_size = cpu.name_for(self.kernels.name, shape.head_size)
            self.kernels_hint = cpu.hint_for(self.kernels.name, by_head_size, shape.head_size)

    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Nothing: `prefill` and `decode` take their tokens in."""

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        assert request_blocks is not None
        self.kernels.prefill_attention(
            query, key, value, self.memory, request_blocks[0], chunk.context_len, self.rules, output
        )

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
        assert request_blocks is not None
        self.kernels.decode_attention(
            query, key, value, self.memory, request_blocks[:, 0], seq_lens, self.rules, output
        )


def _state(
    settings: LolaSettings, shape: LayerShape, place: LayerPlace, directions: Directions | None, device: torch.device
) -> State:
    if settings.state == "none":
        return NoState()
    if settings.feature_maps is not None:
        return HedgehogState(load_feature_maps(settings.feature_maps, shape, place).to(device))
    if directions is None:
        directions = slow_directions(shape.kv_heads, shape.head_size, settings.state_rank, Rotary(shape.head_size))
    return SlopeState(directions.to(device), shape.scale)
