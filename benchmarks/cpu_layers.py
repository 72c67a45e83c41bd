"""Attention-like layers in the formats of both backends, and calls of both, for the CPU benchmarks.

Keys are low-rank content (topics that change every few hundred tokens, heavy tails) with a common mean, a few sink
tokens and noise; queries look for a topic. Content logits have standard deviations of 1 to 2.3, as in the test sets.
"""

from dataclasses import dataclass, replace
from time import perf_counter

import torch
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_lrqk.core.host_pages import allocate_host_pages
from vllm_lrqk.core.huge_pages import ask_for_huge_pages
from vllm_lrqk.core.moments import MomentSums, mean_moments
from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.methods.lrqk.calibrated_basis import CalibratedBasis, make_basis
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
GROUP = HEADS // KV_HEADS
CONTENT_RANK = 28
LOGIT_STDS = (2.3, 1.1, 1.9, 1.2)
"""Of the query heads of one KV head."""
SINK_LOGIT = 4.0
SCALE = HEAD_SIZE**-0.5


@dataclass
class Layer:
    """One layer of some requests of equal length, for both backends."""

    query: torch.Tensor
    """[B, H, d]"""
    host: torch.Tensor
    """[pages, KV, N, 2, d]"""
    factors: FactorPages | CalibratedPages
    cpu_attn_cache: torch.Tensor
    """[pages, KV, 2 N, d], the keys of a page and then its values, packed as that kernel wants them"""
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    def clone(self) -> "Layer":
        factors = copy(self.factors, self.factors.raw.clone())
        pool, kv_heads, n, _, head_size = self.host.shape
        host = allocate_host_pages(pool, kv_heads, n, head_size, self.host.dtype)
        host.copy_(self.host)
        cache = self.cpu_attn_cache.clone()
        return Layer(self.query, host, factors, cache, self.block_table, self.seq_lens).in_huge_pages()

    def apart(self, layers: int) -> "Layer":
        """The same, with factor pages that lie a block of that many layers apart, as in vLLM's tensor."""
        raw = self.factors.raw
        blocks = torch.zeros(len(raw), layers, *raw.shape[1:], dtype=raw.dtype)
        ask_for_huge_pages(blocks, is_written=True)
        blocks[:, layers // 2] = raw
        return replace(self, factors=copy(self.factors, blocks[:, layers // 2]))

    def in_huge_pages(self) -> "Layer":
        """The same, with all that both backends read in huge pages, as the engine asks for them."""
        for tensor in (self.factors.raw, self.cpu_attn_cache):
            ask_for_huge_pages(tensor, is_written=True)
        return self


def make_layer(
    length: int, batch: int, config: LRQKSettings, dtype: torch.dtype, kernels: Kernels, seed: int = 0
) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    n = config.page_size
    num_pages = -(-length // n)
    pool = batch * num_pages
    host = allocate_host_pages(pool, KV_HEADS, n, HEAD_SIZE, dtype)
    factors = empty_factors(pool, config, seed)
    block_table = torch.randperm(pool, generator=generator).view(batch, num_pages).int()
    query = torch.empty(batch, HEADS, HEAD_SIZE, dtype=dtype)
    for request in range(batch):
        writer = TokenWriter(generator)
        for index, page in enumerate(block_table[request].tolist()):
            writer.write(host[page], is_first=index == 0)
            pages, numbers = torch.tensor([page]), torch.tensor([index])
            if isinstance(factors, CalibratedPages):
                kernels.seal_calibrated(pages, numbers, host, factors)
            else:
                kernels.seal_pages(pages, host, factors, config)
        query[request] = writer.queries(1)[0].flatten(0, 1).to(dtype)
    seq_lens = torch.full((batch,), length, dtype=torch.int32)
    return Layer(query, host, factors, pack_cache(host), block_table, seq_lens).in_huge_pages()


def empty_factors(pool: int, config: LRQKSettings, seed: int) -> FactorPages | CalibratedPages:
    """Factor pages that nothing was written to; calibrated ones in a basis of the first request."""
    if not config.is_calibrated:
        form = PageFormat.from_config(config, HEAD_SIZE)
        return FactorPages(torch.zeros(pool, KV_HEADS, form.page_bytes, dtype=torch.uint8), form)
    calibrated = CalibratedFormat.from_config(config, HEAD_SIZE)
    raw = torch.zeros(pool, KV_HEADS, calibrated.page_bytes, dtype=torch.uint8)
    return CalibratedPages(raw, calibrated, calibrated_basis(pool, config.page_size, calibrated.rank, seed))


def calibrated_basis(pages: int, page_size: int, rank: int, seed: int) -> CalibratedBasis:
    """Of the first 16 pages of the first request. Tokens have no positions here: frames are all alike."""
    still = torch.ones(pages * page_size, HEAD_SIZE // 2)
    rotary = RotaryTable(still, torch.zeros_like(still), True)
    sums = MomentSums(KV_HEADS, HEAD_SIZE, page_size, rotary, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    torch.randperm(pages, generator=generator)  # as `make_layer` draws
    writer = TokenWriter(generator)
    for index in range(min(16, pages)):
        page = torch.empty(KV_HEADS, page_size, 2, HEAD_SIZE)
        writer.write(page, is_first=index == 0)
        key, value = page.transpose(0, 1).unbind(2)
        positions = torch.arange(index * page_size, (index + 1) * page_size)
        sums.add(writer.queries(page_size).flatten(1, 2), key, value, positions)
    return make_basis(mean_moments([sums.sums()], KV_HEADS), rank, rotary.every(page_size))


def copy(factors: FactorPages | CalibratedPages, raw: torch.Tensor) -> FactorPages | CalibratedPages:
    """The same factors with other memory."""
    if isinstance(factors, CalibratedPages):
        return CalibratedPages(raw, factors.format, factors.basis)
    return FactorPages(raw, factors.format)


def pack_cache(host: torch.Tensor) -> torch.Tensor:
    """vLLM's cache with the same rows at the same places."""
    pool, kv_heads, n = host.shape[:3]
    cache = torch.empty(pool, kv_heads, 2 * n, HEAD_SIZE, dtype=host.dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    for page in range(pool):
        rows = host[page].transpose(0, 1).contiguous()  # [N, KV, 2, d]
        slot_mapping = torch.arange(page * n, (page + 1) * n)
        isa = _get_attn_isa(host.dtype, n, HEAD_SIZE)
        vllm_ops.cpu_attn_reshape_and_cache(rows[:, :, 0], rows[:, :, 1], key_cache, value_cache, slot_mapping, isa)
    return cache


class TokenWriter:
    """Tokens of one request, page after page."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        spectrum = torch.arange(1, CONTENT_RANK + 1).float().pow(-0.7)
        self.spectrum = spectrum / spectrum.norm()
        basis = self.normal(KV_HEADS, HEAD_SIZE, CONTENT_RANK)
        self.basis = torch.linalg.qr(basis).Q.mT * HEAD_SIZE**0.5  # [KV, rank, d]
        self.mean = self.normal(KV_HEADS, HEAD_SIZE)
        self.topic = self.normal(CONTENT_RANK)
        self.value_map = self.normal(KV_HEADS, CONTENT_RANK, HEAD_SIZE) / CONTENT_RANK**0.5

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def write(self, page: torch.Tensor, is_first: bool) -> None:
        """Fill one page [KV, N, 2, d]."""
        tokens = page.shape[1]
        if torch.rand(1, generator=self.generator).item() < 0.6:
            self.topic = self.normal(CONTENT_RANK)
        tail = (1 + 3 * (torch.rand(tokens, 1, generator=self.generator) < 0.02)).float()
        content = (0.6 * self.topic + 0.8 * tail * self.normal(tokens, CONTENT_RANK)) * self.spectrum
        key = content @ self.basis + self.mean[:, None] + 0.25 * self.normal(KV_HEADS, tokens, HEAD_SIZE)
        value = content @ self.value_map + 0.5 * self.normal(KV_HEADS, tokens, HEAD_SIZE)
        if is_first:
            key[:, :4] += 2.0 * self.mean[:, None]
            value[:, :4] *= 0.1
        page[..., 0, :], page[..., 1, :] = key.to(page.dtype), value.to(page.dtype)

    def queries(self, count: int) -> torch.Tensor:
        """[count, KV, G, d]"""
        interest = 0.7 * self.topic + 0.7 * self.normal(count, KV_HEADS, GROUP, CONTENT_RANK)
        wanted = torch.tensor(LOGIT_STDS)[:, None]
        interest = interest * (wanted / (interest * self.spectrum).norm(dim=-1, keepdim=True))
        content = torch.einsum("ckgr,krd->ckgd", interest, self.basis) / SCALE / HEAD_SIZE
        along_mean = SINK_LOGIT / SCALE * self.mean / self.mean.square().sum(-1, keepdim=True) / 2
        return content + along_mean[:, None] + 0.1 * self.normal(count, KV_HEADS, GROUP, HEAD_SIZE)


def exact_attention(layer: Layer) -> torch.Tensor:
    """float32 [B, H, d], in float32 from the stored keys and values."""
    outputs = []
    for request, length in enumerate(layer.seq_lens.tolist()):
        rows = layer.host[layer.block_table[request].long()].transpose(0, 1).flatten(1, 2)[:, :length]  # [KV, L, 2, d]
        grouped = layer.query[request].float().unflatten(0, (KV_HEADS, GROUP)) * SCALE
        per_head = []
        for q, kv in zip(grouped, rows):
            weight = (q @ kv[:, 0].float().mT).softmax(-1)
            per_head.append(weight @ kv[:, 1].float())
        outputs.append(torch.cat(per_head))
    return torch.stack(outputs)


class CpuAttn:
    """vLLM's own CPU attention, called as its backend calls it.

    The scheduler metadata is made once, as vLLM makes it once per step for all layers.
    """

    def __init__(self, query_lens: list[int], seq_lens: torch.Tensor, dtype: torch.dtype, kv_heads: int, heads: int):
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0).int()
        self.starts, self.seq_lens = starts, seq_lens
        self.metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(query_lens),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=HEAD_SIZE,
            seq_lens=seq_lens,
            dtype=dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=_get_attn_isa(dtype, 256, HEAD_SIZE),
            enable_kv_split=True,
        )

    def __call__(
        self, query: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor, output: torch.Tensor
    ) -> None:
        key_cache, value_cache = cache.chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=self.starts,
            seq_lens=self.seq_lens,
            scale=SCALE,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0.0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from memory, in order."""
    data = torch.ones(1 << 28)  # 1 GiB
    times = []
    for _ in range(7):
        start = perf_counter()
        data.sum()
        times.append(perf_counter() - start)
    return data.nbytes / min(times)


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over query heads of |o - o_exact| / |o_exact|."""
    return float(((output.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())
