"""The attention implementation of one layer: `LRQKImpl` and so on, one class per method."""

from functools import cache, partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.layer import Layer, LayerPlace, LayerShape
from vllm_lrqk.core.logits import Logits
from vllm_lrqk.core.step import Step
from vllm_lrqk.integration import compat
from vllm_lrqk.integration.checks import check_layer, check_logits
from vllm_lrqk.integration.metrics import Series
from vllm_lrqk.integration.request_blocks import CompanionLayer
from vllm_lrqk.integration.settings import current_device, engine_of, kv_dtype
from vllm_lrqk.integration.worker import Worker


class MethodImpl(AttentionImpl):
    """A method's attention of one layer."""

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
        unsupported = (alibi_slopes, sliding_window, attn_type, kv_sharing_target_layer_name)
        check_layer(self._engine.method.name, *unsupported, extra)
        self._soft_cap, self._sinks = logits_soft_cap, sinks
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        dtype = str(kv_dtype(self._vllm_config)).removeprefix("torch.")
        self.shape = LayerShape(num_heads, self.num_kv_heads, head_size, dtype, self.scale)
        self.worker: Worker | None = None
        self.layer: Layer | None = None
        self.capture: LayerCapture | None = None
        self.workspace: Any = None
        self.companion_name: str | None = None
        self._companion: CompanionLayer | None = None
        self._owns_requests = False
        self._is_prepared = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Add the companion layer, if requests own blocks beside pages, before vLLM asks the layers for their specs.

        vLLM calls it again when weights are reloaded, which changes nothing here but sinks.
        """
        self._logits = logits_of(self._soft_cap, self._sinks)
        if self.layer is not None:
            self.layer.logits = self._logits
        if self._is_prepared:
            return
        self._is_prepared = True
        layers = self._vllm_config.compilation_config.static_forward_context
        own_name, own_layer = next(item for item in layers.items() if getattr(item[1], "impl", None) is self)
        own_layer.attn_backend = own_layer.attn_backend.bound_to(self._engine, Series.of(self._vllm_config))
        bound: dict[str, torch.Tensor] = {}
        expected = [own_name]

        def on_bound(name: str, tensor: torch.Tensor) -> None:
            bound[name] = tensor
            if len(bound) == len(expected):
                assert self.worker is not None
                companion = None if self.companion_name is None else bound[self.companion_name]
                self.layer = self.worker.create_layer(
                    self.shape, self._place(own_name), bound[own_name], companion, self.workspace
                )
                self.layer.logits = self._logits
                self.capture = self.worker.create_capture(own_name, self.shape)
                bound.clear()  # vLLM binds once for profiling and once for good

        compat.on_kv_cache_bound(own_layer, partial(on_bound, own_name))
        plan = self._engine.method.plan(self.head_size, self.shape.torch_dtype, self.shape.group)
        self._owns_requests = not plan.is_paged
        if plan.is_paged and plan.blocks_per_request:
            self.companion_name = f"{own_name}.lrqk_request_blocks"
            expected.append(self.companion_name)
            self._companion = layers[self.companion_name] = CompanionLayer(self.num_kv_heads, self.head_size)
            compat.on_kv_cache_bound(self._companion, partial(on_bound, self.companion_name))
        self.workspace = self._shared_workspace(layers)

    def _place(self, name: str) -> LayerPlace:
        parallel = self._vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size
        return LayerPlace(compat.layer_number(name), parallel.rank % ranks, ranks)

    def _shared_workspace(self, layers: dict[str, Any]) -> Any:
        """The workspace of the other layers of this worker that have this layer's shape, or a new one."""
        for layer in layers.values():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, MethodImpl) and impl.workspace is not None and impl.shape == self.shape:
                return impl.workspace
        max_requests = self._vllm_config.scheduler_config.max_num_seqs
        max_model_len, device = self._vllm_config.model_config.max_model_len, current_device(self._vllm_config)
        return self._engine.method.make_workspace(self.shape, max_requests, max_model_len, device)

    def release(self) -> None:
        """Let go of vLLM's memory and of the worker; no step may follow before new memory is bound."""
        self.worker = self.layer = None
        if self._companion is not None:
            self._companion.kv_cache = torch.tensor([])

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
        """Store this step's keys and values and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
            attn_metadata: None in a profiling run, which leaves zeros.
        """
        if attn_metadata is None or self.layer is None:
            return output.zero_()
        step, count = attn_metadata, attn_metadata.num_tokens
        blocks = step.block_table if self._owns_requests else None
        if self.companion_name is not None:
            blocks = compat.forward_metadata(self.companion_name).blocks
        rows = query[:count], key[:count], value[:count]
        if self.capture is not None and self.worker is not None and self.worker.report.is_serving:
            self.capture.write(*rows, step)
        self.layer.forward(*rows, step, blocks, output[:count])
        return output


def logits_of(soft_cap: float | None, sinks: torch.Tensor | None) -> Logits:
    """What a layer does to its logits, once its weights are loaded."""
    return Logits(soft_cap or 0.0, None if sinks is None else sinks.detach().float().contiguous())


@cache
def impl_class(method: str) -> type[MethodImpl]:
    """The implementation of one method."""
    return type(f"{method}Impl", (MethodImpl,), {"__module__": __name__, "__qualname__": f"{method}Impl"})


def __getattr__(name: str) -> type[MethodImpl]:
    if not name.endswith("Impl"):
        raise AttributeError(name)
    return impl_class(name.removesuffix("Impl"))
