"""The companion of an attention layer that owns the constant blocks of each request, beside the layer's own pages."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lrqk import names
from vllm_lrqk.integration.backend_base import BackendBase, cudagraph_support
from vllm_lrqk.integration.blocks import RequestSpec, request_spec
from vllm_lrqk.integration.settings import engine_of, kv_dtype


class CompanionLayer(nn.Module, AttentionLayerBase):
    """Makes vLLM allocate, admit and free the request blocks of one attention layer."""

    def __init__(self, num_kv_heads: int, head_size: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type:
        return RequestBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RequestSpec:
        engine = engine_of(vllm_config)
        plan = engine.method.plan(self.head_size, kv_dtype(vllm_config), engine.group)
        return request_spec(plan, self.num_kv_heads, self.head_size, engine.first_spare_block)


class RequestBackend(BackendBase):
    """The backend of the companion layers."""

    @staticmethod
    def get_name() -> str:
        return names.REQUEST_BACKEND

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("companion layers own memory and compute nothing")

    @staticmethod
    def get_builder_cls() -> type:
        return RequestTableBuilder


@dataclass
class RequestTable:
    """Blocks of the batch's requests."""

    blocks: torch.Tensor
    """int32 [requests, M]."""


class RequestTableBuilder(AttentionMetadataBuilder[RequestTable]):
    """Hands the companion group's block table through."""

    reorder_batch_threshold = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, RequestSpec)
        self.blocks_per_request = kv_cache_spec.blocks_per_request

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RequestTable:
        # vLLM pads the rows of a block table; the padding names the null block several times over.
        return RequestTable(common_attn_metadata.block_table_tensor[:, : self.blocks_per_request])
