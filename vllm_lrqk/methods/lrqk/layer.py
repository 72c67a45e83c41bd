"""One attention layer of LRQK: pages in both tiers, prefill and sealing; a decoder does the rest."""

from typing import Any, Protocol

import torch

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer
from vllm_lrqk.core.logits import Logits
from vllm_lrqk.core.step import FilledPages, PrefillChunk, Step
from vllm_lrqk.devices import cpu
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import PageKernels
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


class Decoder(Protocol):
    """Stores rows and attends single tokens, on one kind of device."""

    decodes_one_per_request: bool
    """As `Layer.decodes_one_per_request`."""

    def append(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write keys and values [T, KV, d] into the host pages."""

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        hot_blocks: torch.Tensor | None,
        output: torch.Tensor,
        logits: Logits,
    ) -> None:
        """As `Layer.decode`."""

    def warm_up(self) -> None:
        """As `Layer.warm_up`."""


class LRQKLayer(Layer):
    """Factor pages on the device, host pages beside them.

    Args:
        host: [num_pages, KV, N, 2, d].
        scale: factor of the attention scores.
    """

    def __init__(
        self,
        factors: FactorPages | CalibratedPages,
        host: torch.Tensor,
        decoder: Decoder,
        kernels: PageKernels,
        scale: float,
        config: LRQKSettings,
        counters: Counters,
    ) -> None:
        self.factors = factors
        self.host = host
        self.decoder = decoder
        self.decodes_one_per_request = decoder.decodes_one_per_request
        self.kernels = kernels
        head_size = host.shape[-1]
        self.kernels_name = cpu.name_for(kernels.name, head_size)
        self.kernels_hint = cpu.hint_for(kernels.name, self.kernels_name, head_size)
        self.scale = scale
        self.config = config
        self.counters = counters

    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        self.decoder.append(key, value, step.slot_mapping)

    def prefill_all(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        attend = self.kernels.prefill_prompts
        if attend is None or not self.logits.is_plain:
            super().prefill_all(query, key, value, step, request_blocks, output)
            return
        for run in step.prompt_runs:
            of = run.tokens
            if len(run.chunks) == 1:
                self.prefill(query[of], key[of], value[of], run.chunks[0], None, output[of])
                continue
            attend(query[of], key[of], value[of], run, self.scale, output[of])
            self._seal_filled(run.chunks)

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend exactly and seal the pages that the chunk fills."""
        place = self.host, chunk.pages, chunk.context_len, self.scale
        self.kernels.prefill_attention(query, key, value, *place, output, self.logits)
        self._seal_filled([chunk])

    def _seal_filled(self, chunks: list[PrefillChunk]) -> None:
        """Seal the pages that some chunks fill."""
        pages = [chunk.pages[chunk.filled.start : chunk.filled.stop] for chunk in chunks if chunk.filled]
        if pages:
            self._seal(torch.cat(pages).long())

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
        self.decoder.decode(query, key, value, block_table, seq_lens, request_blocks, output, self.logits)

    def seal(self, filled: FilledPages) -> None:
        self._seal(filled.pages)

    @classmethod
    def seal_all(cls, layers: list[Any], filled: FilledPages) -> None:
        seal_layers = layers[0].kernels.seal_layers
        if seal_layers is None:
            super().seal_all(layers, filled)
            return
        pages, hosts, factors = filled.pages, [layer.host for layer in layers], [layer.factors for layer in layers]
        seal_layers(pages, hosts, factors, layers[0].config)
        for layer in layers:
            layer.counters.pages_sealed += len(pages)

    def _seal(self, pages: torch.Tensor) -> None:
        self.kernels.seal_pages(pages, self.host, self.factors, self.config)
        self.counters.pages_sealed += len(pages)

    def warm_up(self) -> None:
        self.decoder.warm_up()
