"""One attention layer's state in both tiers, and its part of a forward step."""

import torch

from vllm_lrqk.core.attend import attend
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.hot_rows import HotCache
from vllm_lrqk.core.prefill import query_grams
from vllm_lrqk.core.step import PrefillChunk, Step
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.kernels import Kernels, kernels_for
from vllm_lrqk.methods.lrqk.settings import LRQKConfig


class Layer:
    """Factor pages, host pages and the hot cache, if there is one, of one layer; how it handles prefill chunks.

    Args:
        host: [num_pages, KV, N, 2, d].
        scale: factor of the attention scores.
    """

    def __init__(
        self,
        factors: FactorPages,
        host: torch.Tensor,
        hot: HotCache | None,
        scale: float,
        config: LRQKConfig,
        counters: Counters,
        kernels: Kernels,
    ) -> None:
        self.factors = factors
        self.host = host
        self.hot = hot
        self.scale = scale
        self.config = config
        self.counters = counters
        self.kernels = kernels

    @property
    def hot_bytes_per_request(self) -> int:
        """Device bytes of one request's hot rows in this layer."""
        if self.hot is None:
            return 0
        blocks = self.hot.format.blocks_for(self.config.num_hot_rows)
        return blocks * self.hot.format.block_bytes * self.host.shape[1]

    def _prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: PrefillChunk, output: torch.Tensor
    ) -> None:
        tokens = slice(chunk.start, chunk.end)
        self.kernels.prefill_attention(
            query[tokens],
            key[tokens],
            value[tokens],
            self.host,
            chunk.pages,
            chunk.context_len,
            self.scale,
            output[tokens],
        )
        if chunk.filled:
            indices, starts, ends = (list(column) for column in zip(*chunk.filled))
            grams = None
            if self.config.factorization == "lrqk":
                grams = query_grams(query[tokens], key.shape[1], starts, ends)
            pages = chunk.pages[indices[0] : indices[-1] + 1].long()
            self.kernels.seal_pages(pages, self.host, self.factors, grams, self.config)
            self.counters.pages_sealed += len(indices)


class LayerState(Layer):
    """A layer whose steps run on the host's memory: the CPU platform, in plain torch or with its kernels."""

    def __init__(
        self,
        factors: FactorPages,
        host: torch.Tensor,
        hot: HotCache | None,
        scale: float,
        config: LRQKConfig,
        counters: Counters,
    ) -> None:
        super().__init__(factors, host, hot, scale, config, counters, kernels_for(host.device))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        hot_table: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """Store the step's keys and values, seal the pages that they fill, and attend.

        Args:
            query, output: [T, H, d].
            key, value: [T, KV, d].
            hot_table: int32 [requests, M], hot blocks of each request; None without a hot cache.
        """
        self.kernels.append_rows(key, value, self.host, step.slots)
        if self.hot is not None:
            self.hot.pages_written(step.slots, self.config.page_size)
        for chunk in step.prefill:
            self._prefill(query, key, value, chunk, output)
        if step.decode is not None:
            self._decode(query, step, hot_table, output)

    def _decode(self, query: torch.Tensor, step: Step, hot_table: torch.Tensor | None, output: torch.Tensor) -> None:
        decode = step.decode
        assert decode is not None
        if len(decode.filled_pages):
            self.kernels.seal_pages(decode.filled_pages, self.host, self.factors, None, self.config)
            self.counters.pages_sealed += len(decode.filled_pages)
        queries = query[decode.tokens]
        attended = torch.empty_like(queries)
        if self.hot is None:
            rows = self.kernels.decode_attention(
                queries,
                self.host,
                self.factors,
                decode.block_table,
                decode.seq_lens,
                self.scale,
                self.config,
                attended,
            )
            self.counters.rows_attended += int(rows.sum())
        else:
            assert hot_table is not None
            selection = self.kernels.select(
                queries, self.factors, decode.block_table, decode.seq_lens, self.scale, self.config
            )
            rows_kv, fetch = self.hot.resolve(
                selection.rows, self.host, decode.block_table, hot_table[decode.requests], decode.seq_lens, step.number
            )
            attended.copy_(attend(queries, rows_kv, selection, self.factors, decode.block_table, self.scale))
            self.counters.rows_attended += int((selection.rows >= 0).sum())
            self.counters.rows_hit += fetch.hits
            self.counters.rows_missed += fetch.misses
            self.counters.bytes_fetched += fetch.misses * self.hot.format.row_bytes
        self.counters.decode_tokens += len(decode.tokens)
        output[decode.tokens] = attended
