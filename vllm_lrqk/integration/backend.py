"""The attention backend that vLLM sees, and the builders of its metadata."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_lrqk.core.step import Step, build_step
from vllm_lrqk.device_step import DeviceStep, build_device_step
from vllm_lrqk.integration.blocks import FactorSpec, HotSpec, factor_spec
from vllm_lrqk.integration.device import device_operators
from vllm_lrqk.integration.device_worker import DeviceWorkerState
from vllm_lrqk.integration.startup import host_plan, read_config
from vllm_lrqk.integration.worker import WorkerState
from vllm_lrqk.methods.lrqk.settings import ConfigError
from vllm_lrqk.plugin import BACKEND, HOT_BACKEND


class LRQKBackend(AttentionBackend):
    """Factor pages on the device, keys and values in CPU memory."""

    forward_includes_kv_cache_update = True
    vllm_config: ClassVar[Any] = None
    """Of the engine being built in this worker; vLLM asks for specs outside its own configuration context."""
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type:
        from vllm_lrqk.integration.impl import LRQKImpl

        return LRQKImpl

    @staticmethod
    def get_builder_cls() -> type:
        return StepBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Block outermost: factor pages and hot blocks share one pool; head before token: a page is one run of bytes.
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if isinstance(spec, FactorSpec):
            return spec
        if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
            raise ConfigError(f"LRQK serves full attention with equal key and value sizes, this layer has {spec}.")
        return factor_spec(spec, read_config(cls.vllm_config), host_plan(cls.vllm_config).num_pages)


class HotBackend(LRQKBackend):
    """The backend of the companion layers that own the hot blocks."""

    @staticmethod
    def get_name() -> str:
        return HOT_BACKEND

    @staticmethod
    def get_builder_cls() -> type:
        return HotTableBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec


def cudagraph_support(vllm_config: Any) -> AttentionCGSupport:
    """Batches of one token per request can be captured whole; the CPU platform has no graphs."""
    is_cpu = vllm_config.device_config.device_type == "cpu"
    return AttentionCGSupport.NEVER if is_cpu else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class StepBuilder(AttentionMetadataBuilder[Step | DeviceStep]):
    """Derives a step from vLLM's metadata, once per forward pass, and the state that the layers share."""

    reorder_batch_threshold = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, FactorSpec)
        impls = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        for impl in impls:
            impl.worker = impl.state = None  # of an earlier pool: its host memory goes before the next is taken
        self.worker: WorkerState
        operators = device_operators()
        if operators is None:
            self.worker = WorkerState(kv_cache_spec, layer_names, vllm_config)
        else:
            self.worker = DeviceWorkerState(kv_cache_spec, layer_names, vllm_config, device, operators)
            self.reorder_batch_threshold = 1  # requests with one token come first
        for impl in impls:
            impl.worker = self.worker
        self.page_size = kv_cache_spec.block_size

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step | DeviceStep:
        return self._build(common_attn_metadata, is_capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step | DeviceStep:
        # Replays read the lengths from the same memory; until then all requests are padding, which no kernel touches.
        common_attn_metadata.seq_lens.zero_()
        return self._build(common_attn_metadata, is_capture=True)

    def _build(self, common: CommonAttentionMetadata, is_capture: bool) -> Step | DeviceStep:
        query_starts, table, page_size = common.query_start_loc_cpu.tolist(), common.block_table_tensor, self.page_size
        if isinstance(self.worker, DeviceWorkerState):
            assert common.seq_lens_cpu_upper_bound is not None
            lens = common.seq_lens_cpu_upper_bound.tolist()
            step = build_device_step(query_starts, lens, table, common.seq_lens, common.slot_mapping, page_size)
            self.worker.begin_step(step, is_capture)
            return step
        assert common.is_prefilling is not None
        prefilling, slots = common.is_prefilling.tolist(), common.slot_mapping
        number = self.worker.next_step(table, common.seq_lens)
        return build_step(query_starts, common.seq_lens, prefilling, table, slots, page_size, number)


@dataclass
class HotTable:
    """Hot blocks of the batch's requests."""

    blocks: torch.Tensor
    """int32 [requests, M]."""


class HotTableBuilder(AttentionMetadataBuilder[HotTable]):
    """Hands the hot group's block table through."""

    reorder_batch_threshold = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, HotSpec)
        self.blocks_per_request = kv_cache_spec.blocks_per_request

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HotTable:
        # vLLM pads the rows of a block table; the padding names the null block several times over.
        return HotTable(common_attn_metadata.block_table_tensor[:, : self.blocks_per_request])
