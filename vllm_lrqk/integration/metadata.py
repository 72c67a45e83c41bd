"""Derives a step from vLLM's metadata, once per forward pass and group of layers."""

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lrqk.core.step import Step, build_step
from vllm_lrqk.integration.backend_base import cudagraph_support, prefilling
from vllm_lrqk.integration.blocks import RequestSpec
from vllm_lrqk.integration.worker import Worker


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the worker that the group's layers share, and their steps."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Requests with one token, or with drafted ones behind it, come first.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        impls = [vllm_config.compilation_config.static_forward_context[name].impl for name in layer_names]
        for impl in impls:
            impl.release()  # of an earlier pool: its host memory goes before the next is taken
        self.worker = Worker(kv_cache_spec, layer_names, vllm_config, device)
        for impl in impls:
            impl.worker = self.worker
        self.page_size = kv_cache_spec.block_size
        # vLLM pads the rows of a block table; the padding names the null block several times over.
        self.width = kv_cache_spec.blocks_per_request if isinstance(kv_cache_spec, RequestSpec) else None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        return self._build(common_attn_metadata, is_capture=False)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Step:
        # Replays read the lengths from the same memory; until then all requests are padding, which no kernel touches.
        common_attn_metadata.seq_lens.zero_()
        return self._build(common_attn_metadata, is_capture=True)

    def _build(self, common: CommonAttentionMetadata, is_capture: bool) -> Step:
        assert common.seq_lens_cpu_upper_bound is not None
        lens = common.seq_lens_cpu_upper_bound.tolist()
        table = common.block_table_tensor[:, : self.width]
        starts = common.query_start_loc_cpu.tolist()
        drafts = self.reorder_batch_threshold, prefilling(common)
        step = build_step(starts, lens, table, common.seq_lens, common.slot_mapping, self.page_size, *drafts)
        self.worker.begin_step(step, is_capture)
        return step
