"""The attention backend of layers with a sliding window beside a method's: exact, over rows in vLLM's own blocks."""

from functools import cache
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from vllm_lrqk import names
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.step import Step, build_step
from vllm_lrqk.core.windows import WindowPlan
from vllm_lrqk.devices import cpu
from vllm_lrqk.devices.window_layer import WindowLayer
from vllm_lrqk.integration.backend_base import BackendBase, cudagraph_support, prefilling
from vllm_lrqk.integration.checks import check_layer, check_logits
from vllm_lrqk.integration.impl import logits_of
from vllm_lrqk.integration.settings import Engine, engine_of, kv_dtype
from vllm_lrqk.integration.window_blocks import WindowSpec, window_spec


class WindowBackend(BackendBase):
    """Keys and values of the last tokens, in blocks that vLLM frees when they leave the window."""

    engine: ClassVar[Engine]
    """Of the layers, in a class that `bound_to` made."""
    dtype: ClassVar[torch.dtype]
    """Of keys and values; as `engine`."""

    @staticmethod
    def get_name() -> str:
        return names.WINDOW_BACKEND

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type:
        return WindowImpl

    @staticmethod
    def get_builder_cls() -> type:
        return WindowStepBuilder

    @classmethod
    @cache
    def bound_to(cls, engine: Engine, dtype: torch.dtype) -> "type[WindowBackend]":
        """This backend for one engine, as `MethodBackend.bound_to`."""
        return type(cls.__name__, (cls,), {"__module__": __name__, "engine": engine, "dtype": dtype})

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if isinstance(spec, WindowSpec):
            return spec
        windows = cls.engine.windows
        if type(spec) is not SlidingWindowSpec or windows is None or spec.head_size_v != spec.head_size:
            raise ConfigError(
                f"{cls.engine.method.name} serves sliding windows with equal key and value sizes beside full "
                f"attention, this layer has {spec}."
            )
        _check_plan(cls.engine.method.name, windows.plan, spec, cls.dtype)
        shape = spec.num_kv_heads, spec.head_size, cls.dtype
        return window_spec(spec.sliding_window, windows.plan.block_size, *shape, windows.blocks)


def _check_plan(method: str, plan: WindowPlan, spec: SlidingWindowSpec, dtype: torch.dtype) -> None:
    bytes_per_token = spec.num_kv_heads * 2 * spec.head_size * dtype.itemsize
    if (spec.sliding_window, bytes_per_token) != (plan.window, plan.bytes_per_token):
        raise ConfigError(
            f"{method} serves windows of one size and shape ({plan.window} tokens of {plan.bytes_per_token} bytes), "
            f"and a layer has {spec.sliding_window} tokens of {bytes_per_token} bytes: "
            "choose another attention backend."
        )


class WindowImpl(AttentionImpl):
    """Attention of one layer to a window."""

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
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self._vllm_config = get_current_vllm_config()
        self._engine = engine_of(self._vllm_config)
        check_logits(self._engine.method, logits_soft_cap, sinks)
        check_layer(self._engine.method.name, alibi_slopes, None, attn_type, kv_sharing_target_layer_name, extra)
        self._soft_cap, self._sinks = logits_soft_cap, sinks
        assert sliding_window is not None
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        dtype = str(kv_dtype(self._vllm_config)).removeprefix("torch.")
        shape = LayerShape(num_heads, self.num_kv_heads, head_size, dtype, self.scale)
        self.layer = WindowLayer(shape, sliding_window, cpu.instruction_sets())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Tell the layer's backend of the engine before vLLM asks it for its spec."""
        self.layer.logits = logits_of(self._soft_cap, self._sinks)
        layers = self._vllm_config.compilation_config.static_forward_context.values()
        own = next(layer for layer in layers if getattr(layer, "impl", None) is self)
        own.attn_backend = WindowBackend.bound_to(self._engine, self.layer.shape.torch_dtype)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store this step's keys and values and attend; shapes as of `MethodImpl.forward`."""
        if attn_metadata is None:
            return output.zero_()
        count = attn_metadata.num_tokens
        self.layer.forward(query[:count], key[:count], value[:count], attn_metadata, kv_cache, output[:count])
        return output


class WindowStepBuilder(AttentionMetadataBuilder[Step]):
    """The steps of a group of layers with a window, whose block table is their own."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests with one token, or with drafted ones behind it, come first.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.block_size = kv_cache_spec.block_size

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common = common_attn_metadata
        assert common.seq_lens_cpu_upper_bound is not None
        lens, starts = common.seq_lens_cpu_upper_bound.tolist(), common.query_start_loc_cpu.tolist()
        table, slots = common.block_table_tensor, common.slot_mapping
        drafts = self.reorder_batch_threshold, prefilling(common)
        return build_step(starts, lens, table, common.seq_lens, slots, self.block_size, *drafts)
