"""One attention layer of a method, and what vLLM's part of the package asks of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from vllm_lrqk.core.logits import PLAIN, Logits
from vllm_lrqk.core.step import FilledPages, PrefillChunk, Step


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer on one rank, and the type of its keys and values."""

    heads: int
    kv_heads: int
    head_size: int
    dtype: str
    """Name of the torch type: "bfloat16", "float16" or "float32"."""
    scale: float
    """Factor of the attention scores."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def row_shape(self) -> tuple[int, int]:
        """Heads of a token's query, key and value, and their size."""
        return self.heads + 2 * self.kv_heads, self.head_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's query, key and value."""
        return self.row_shape[0] * self.row_shape[1] * self.torch_dtype.itemsize


@dataclass(frozen=True)
class LayerPlace:
    """Where a layer is in its model, for files that hold something for each of its layers and heads."""

    number: int = 0
    """Of the attention layer in the model, from 0."""
    rank: int = 0
    """Of tensor parallelism: the layer has this share of the model's heads."""
    ranks: int = 1


@dataclass
class LayerMemory:
    """What vLLM and the worker allocated for one layer; None where the method asked for nothing."""

    blocks: torch.Tensor | None
    """uint8 [num_blocks, KV, block bytes], what each block holds of its tokens."""
    request_blocks: torch.Tensor | None
    """uint8 [num_blocks, KV, block bytes], the same pool of blocks, as those that a request owns."""
    host: torch.Tensor | None
    """[num_pages, KV, N, 2, d], keys and values in CPU memory, page by page beside the first blocks."""


class Layer(ABC):
    """Serves the steps of one attention layer.

    Requests with one token decode, and each of several where they were drafted; all other chunks are prefilled. A batch
    of single tokens alone can be captured into a graph. In what follows `request_blocks` is int32 [R, M], the blocks
    that each request owns; None where the method asks for none.
    """

    logits: Logits = PLAIN
    """Given before the first step, to layers of methods that serve other than plain ones."""
    kernels_name = "torch"
    """Of what computes, for the log."""
    kernels_hint = ""
    """A sentence where this machine has better kernels than those that the layer can use."""
    decodes_one_per_request = False
    """Whether several tokens of one request decode one after the other, as they change what it owns."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Store the step's keys and values and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
        """
        self.append(key, value, step)
        if step.prefill:
            self.prefill_all(query, key, value, step, request_blocks, output)
        if not step.num_decodes:
            return
        if step.passed_pages is not None:
            self.seal(step.passed_pages)
        for part in step.decoding(self.decodes_one_per_request):
            own = None if request_blocks is None else request_blocks[part.requests]
            of, where = part.tokens, (part.block_table, part.seq_lens, own)
            if isinstance(of, slice):
                self.decode(query[of], key[of], value[of], *where, output[of])
            else:
                answer = torch.empty_like(output[of])
                self.decode(query[of], key[of], value[of], *where, answer)
                output[of] = answer

    @abstractmethod
    def append(self, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Store the keys and values [T, KV, d] of all tokens of a step."""

    def prefill_all(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend all chunks of a step, one by one unless a layer knows better; arguments as of `forward`."""
        for chunk in step.prefill:
            of = chunk.tokens
            own = None if request_blocks is None else request_blocks[chunk.request]
            self.prefill(query[of], key[of], value[of], chunk, own, output[of])

    @abstractmethod
    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Attend one chunk; `query` and `output` [t, H, d], `key` and `value` [t, KV, d] are its tokens' own."""

    @abstractmethod
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
        """Attend B tokens, each as the last of its request; where tokens were drafted a request may have several, of
        which all are stored.

        Args:
            query, output: [B, H, d].
            key, value: [B, KV, d].
            block_table: int32 [B, P].
            seq_lens: int32 [B], the current token included; 0 for padding, whose output is zero.
        """

    def seal(self, filled: FilledPages) -> None:
        """Called before the next step with the pages that this step's decode tokens fill, on the device.

        Where tokens were drafted it may be called in the step, and a page that they fill is sealed once more if they
        are rejected and others fill it.
        """

    @classmethod
    def seal_all(cls, layers: "list[Any]", filled: FilledPages) -> None:
        """`seal` of all layers of a worker, which are of this class: one by one unless a method knows better."""
        for layer in layers:
            layer.seal(filled)

    def warm_up(self) -> None:
        """Compile what is compiled at first use, by steps of padding alone."""
