"""One layer's prompt and decode steps with dense, page-local and published attention.

The error is the mean over decode steps and query heads of |o - o_dense| / |o_dense| (Euclidean norms of a head's
output vector). Dense attention sees the same bfloat16 keys and values, in float32.
"""

import torch

from vllm_lrqk.core.attend import gather_rows
from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.moments import MomentSums, mean_moments
from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.evaluation.reference.published_attention import PublishedAttention, PublishedSettings
from vllm_lrqk.methods.lrqk import calibrated_seal
from vllm_lrqk.methods.lrqk.calibrated_basis import CalibratedBasis, make_basis
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.decode import attend_selection
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.seal import seal_pages
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

UNWRITTEN = 0xFF
"""Byte that fills factor pages before they are sealed: NaN in every floating-point type."""


def relative_error(output: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """|o - o_dense| / |o_dense| of each step and query head: [T, H] from [T, H, d]."""
    return (output - dense).norm(dim=-1) / dense.norm(dim=-1)


def dense_decode(qkv: QKV, steps: int) -> torch.Tensor:
    """Dense attention of the first decode steps: float32 [T, H, d]."""
    key, value = qkv.key.float().transpose(0, 1), qkv.value.float().transpose(0, 1)  # [KV, L, d]
    outputs = []
    for length in range(qkv.prompt_tokens + 1, qkv.prompt_tokens + steps + 1):
        query = qkv.query[length - 1].float().unflatten(0, (key.shape[0], -1))  # [KV, G, d]
        weight = (query @ key[:, :length].mT * key.shape[-1] ** -0.5).softmax(-1)
        outputs.append((weight @ value[:, :length]).flatten(0, 1))
    return torch.stack(outputs)


class PagedLayer:
    """Host pages and factor pages of one layer with one request, unwritten places filled with NaN.

    Args:
        num_tokens: the most tokens that the request will have.
    """

    def __init__(self, qkv: QKV, num_tokens: int, config: LRQKSettings) -> None:
        _, kv_heads, d = qkv.key.shape
        page_format = PageFormat.from_config(config, d)
        num_pages = -(-num_tokens // config.page_size)
        raw = torch.full((num_pages, kv_heads, page_format.page_bytes), UNWRITTEN, dtype=torch.uint8)
        self.config, self.scale = config, d**-0.5
        self.factors: FactorPages | CalibratedPages = FactorPages(raw, page_format)
        self.host = torch.full((num_pages, kv_heads, config.page_size, 2, d), torch.nan, dtype=qkv.key.dtype)
        self.pages = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        self.num_tokens = 0
        self.rows_attended: list[float] = []
        """Mean over the KV heads, of each decode step."""

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write tokens [T, KV, d] and seal the pages that they fill."""
        n, start, end = self.config.page_size, self.num_tokens, self.num_tokens + len(key)
        position = torch.arange(start, end)
        append_rows(key, value, self.host, self.pages[position // n] * n + position % n)
        self.num_tokens = end
        filled = list(range(start // n, end // n))
        if filled:
            self._seal(filled)

    def _seal(self, filled: list[int]) -> None:
        """Seal pages by their index."""
        assert isinstance(self.factors, FactorPages)
        seal_pages(self.pages[filled], self.host, self.factors, self.config)

    def decode(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend with the query [H, d] of the latest token: float32 [H, d], and the rows int32 [KV, R], -1 for none."""
        query, table = query[None], self.pages[None]
        length = torch.tensor([self.num_tokens])
        selection = select(query, self.factors, table, length, self.scale, self.config)
        rows_kv = gather_rows(self.host, table, selection.positions)
        self.rows_attended.append(float((selection.positions >= 0).sum(-1).float().mean()))
        return attend_selection(query, rows_kv, selection, self.factors, table, self.scale)[0], selection.positions[0]

    def device_bytes(self) -> int:
        """Bytes on the GPU with the hot cache on: factor pages, the open one included, and all hot rows."""
        pages = -(-self.num_tokens // self.config.page_size)
        _, kv_heads, _, _, d = self.host.shape
        hot = self.config.num_hot_rows * 2 * d * self.host.element_size()
        return kv_heads * (pages * self.factors.format.page_bytes + hot)


class CalibratedLayer(PagedLayer):
    """The same with calibrated factors."""

    def __init__(self, qkv: QKV, num_tokens: int, config: LRQKSettings, basis: CalibratedBasis, has_value_map: bool):
        super().__init__(qkv, num_tokens, config)
        rank = basis.query.shape[-1]
        form = CalibratedFormat(config.page_size, qkv.key.shape[-1], rank // 2, rank - rank // 2, has_value_map)
        raw = torch.full((*self.host.shape[:2], form.page_bytes), UNWRITTEN, dtype=torch.uint8)
        self.factors = CalibratedPages(raw, form, basis)

    def _seal(self, filled: list[int]) -> None:
        assert isinstance(self.factors, CalibratedPages)
        calibrated_seal.seal_pages(self.pages[filled], torch.tensor(filled), self.host, self.factors)


def calibrated_on_prompt(qkv: QKV, rotary: RotaryTable, rank: int, page_size: int, tokens: int) -> CalibratedBasis:
    """The basis that the first tokens of a sequence give, as if they were the calibration's text."""
    _, kv_heads, d = qkv.key.shape
    sums = MomentSums(kv_heads, d, page_size, rotary, torch.device("cpu"))
    sums.add(qkv.query[:tokens], qkv.key[:tokens], qkv.value[:tokens], torch.arange(tokens))
    return make_basis(mean_moments([sums.sums()], kv_heads), rank, rotary.every(page_size))


def paged_decode(
    qkv: QKV, steps: int, config: LRQKSettings, layer: PagedLayer | None = None
) -> tuple[torch.Tensor, PagedLayer]:
    """The prompt, then decode steps that append their token: outputs float32 [T, H, d] and the layer.

    Args:
        layer: an empty one; default: of page-local factors.
    """
    layer = layer or PagedLayer(qkv, qkv.prompt_tokens + steps, config)
    layer.append(qkv.key[: qkv.prompt_tokens], qkv.value[: qkv.prompt_tokens])
    outputs = []
    for i in range(qkv.prompt_tokens, qkv.prompt_tokens + steps):
        layer.append(qkv.key[i : i + 1], qkv.value[i : i + 1])
        outputs.append(layer.decode(qkv.query[i])[0])
    return torch.stack(outputs), layer


def published_decode(
    qkv: QKV, steps: int, settings: PublishedSettings
) -> tuple[torch.Tensor, PublishedAttention, list[int]]:
    """LRQK as published: outputs float32 [T, H, d], the final state, and the misses of each step."""
    prompt, outputs, misses = slice(0, qkv.prompt_tokens), [], []
    state = PublishedAttention(
        qkv.query[prompt].transpose(0, 1), qkv.key[prompt].transpose(0, 1), qkv.value[prompt].transpose(0, 1), settings
    )
    for i in range(qkv.prompt_tokens, qkv.prompt_tokens + steps):
        outputs.append(state.decode(qkv.query[i], qkv.key[i], qkv.value[i]))
        misses.append(state.misses)
    return torch.stack(outputs), state, misses
