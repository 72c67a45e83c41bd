"""The attention backend that vLLM sees, and the builders of its metadata."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_lrqk.config import ConfigError
from vllm_lrqk.integration.spec import FactorSpec, HotSpec, factor_spec
from vllm_lrqk.integration.startup import host_plan, read_config
from vllm_lrqk.plugin import BACKEND, HOT_BACKEND
from vllm_lrqk.step import Step, build_step


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


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Derives a Step from vLLM's metadata, once per forward pass, and the state that the layers share."""

    reorder_batch_threshold = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        from vllm_lrqk.integration.worker import WorkerState

        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, FactorSpec)
        self.worker = WorkerState(kv_cache_spec, layer_names, vllm_config)
        for name in layer_names:
            vllm_config.compilation_config.static_forward_context[name].impl.worker = self.worker
        self.page_size = kv_cache_spec.block_size

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common = common_attn_metadata
        assert common.is_prefilling is not None
        number = self.worker.next_step(common.block_table_tensor, common.seq_lens)
        return build_step(
            common.query_start_loc_cpu.tolist(),
            common.seq_lens,
            common.is_prefilling.tolist(),
            common.block_table_tensor,
            common.slot_mapping,
            self.page_size,
            number,
        )


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

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HotTable:
        # vLLM pads the rows of a block table; the padding names the null block several times over.
        return HotTable(common_attn_metadata.block_table_tensor[:, : self.blocks_per_request])
