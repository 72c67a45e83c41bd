"""The attention implementation of one layer, and its companion that owns the hot blocks."""

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.layer import LayerState
from vllm_lrqk.device_layer import DeviceLayerState
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.backend import HotBackend, LRQKBackend
from vllm_lrqk.integration.blocks import HotSpec, hot_spec
from vllm_lrqk.integration.checks import check_layer
from vllm_lrqk.integration.device import device_operators, make_decode_path
from vllm_lrqk.integration.startup import host_plan, kv_dtype, read_config, uses_hot_cache
from vllm_lrqk.integration.worker import WorkerState


class HotLayer(nn.Module, AttentionLayerBase):
    """Makes vLLM allocate, admit and free the hot blocks of one attention layer."""

    def __init__(self, num_kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type:
        return HotBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> HotSpec:
        config, pages = read_config(vllm_config), host_plan(vllm_config).num_pages
        return hot_spec(config, self.num_kv_heads, self.head_size, kv_dtype(vllm_config), pages)


class LRQKImpl(AttentionImpl):
    """LRQK attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        check_layer(alibi_slopes, sliding_window, logits_soft_cap, attn_type, kv_sharing_target_layer_name, extra)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.worker: WorkerState | None = None
        self.state: LayerState | DeviceLayerState | None = None
        self.capture: LayerCapture | None = None
        self.decode_path: Any = None
        self.hot_name: str | None = None
        self._vllm_config = LRQKBackend.vllm_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Add the companion layer, if there is a hot cache, before vLLM asks the layers for their specs."""
        layers = self._vllm_config.compilation_config.static_forward_context
        own_name, own_layer = next(item for item in layers.items() if getattr(item[1], "impl", None) is self)
        bound: dict[str, torch.Tensor] = {}
        expected = [own_name]

        def on_bound(name: str, tensor: torch.Tensor) -> None:
            bound[name] = tensor
            if len(bound) == len(expected):
                assert self.worker is not None
                hot = None if self.hot_name is None else bound[self.hot_name]
                self.state = self.worker.create_state(own_name, bound[own_name], hot, self.scale, self.decode_path)
                self.capture = self.worker.create_capture(own_name, self.num_heads, self.scale)
                bound.clear()  # vLLM binds once for profiling and once for good

        compat.on_kv_cache_bound(own_layer, partial(on_bound, own_name))
        if uses_hot_cache(read_config(self._vllm_config)):
            self.hot_name = f"{own_name}.lrqk_hot"
            expected.append(self.hot_name)
            layers[self.hot_name] = HotLayer(self.num_kv_heads, self.head_size)
            compat.on_kv_cache_bound(layers[self.hot_name], partial(on_bound, self.hot_name))
        operators = device_operators()
        if operators is not None:
            self.decode_path = self._shared_decode_path(operators, layers)

    def _shared_decode_path(self, operators: Any, layers: dict[str, Any]) -> Any:
        """The decode path of the other layers of this worker, if they have this layer's shapes, or a new one."""
        shape = (self.num_heads, self.num_kv_heads, self.head_size)
        for layer in layers.values():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, LRQKImpl) and impl.decode_path is not None:
                path = impl.decode_path
                if (path.heads, path.kv_heads, path.head_size) == shape:
                    return path
        return make_decode_path(operators, self._vllm_config, read_config(self._vllm_config), *shape)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store this step's keys and values and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
            attn_metadata: the builder's `Step` or `DeviceStep`; None in a profiling run, which leaves zeros.
        """
        if attn_metadata is None or self.state is None:
            return output.zero_()
        count = attn_metadata.num_tokens
        hot_table = None if self.hot_name is None else compat.forward_metadata(self.hot_name).blocks
        if self.capture is not None:
            self.capture.write(query[:count], key[:count], value[:count], attn_metadata)
        self.state.forward(query[:count], key[:count], value[:count], attn_metadata, hot_table, output[:count])
        return output
