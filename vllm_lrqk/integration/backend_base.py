"""What all attention backends of the package tell vLLM alike."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout


class BackendBase(AttentionBackend):
    """Blocks of bytes, written and read by the method's own layers."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "float16", "bfloat16", "float32"]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Block outermost: groups of different kinds share one pool; head before token: a page is one run of bytes.
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True  # layers refuse them where their method does not serve them

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or capability.major >= 8

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # steps are planned from the host's copy


def cudagraph_support(vllm_config: Any) -> AttentionCGSupport:
    """Batches of one token per request can be captured whole; the CPU platform has no graphs."""
    is_cpu = vllm_config.device_config.device_type == "cpu"
    return AttentionCGSupport.NEVER if is_cpu else AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def prefilling(common: CommonAttentionMetadata) -> list[bool] | None:
    """Whether each request of a batch is in its prompt; None where vLLM does not say."""
    return None if common.is_prefilling is None else common.is_prefilling.tolist()
