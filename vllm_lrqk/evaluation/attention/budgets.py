"""How many rows each method can attend within a budget of device bytes, for one layer and one request.

Every method keeps all keys and values in CPU memory. On the device it has an index over the tokens and a hot cache,
the rows (a key and a value each) that recent steps used:

    device bytes = index + hot rows x KV heads x row bytes          row bytes = 2 d x item bytes

The hot cache has a quarter more rows than one step attends, as `LRQKSettings.num_hot_rows`; what remains of the budget
after the index so gives the rows of a step, and they less those that are always attended give top_k. Bytes are those
at the end of the run. Bookkeeping of some bytes per row or page is left out for all methods. Not so:

- published: everything is per query head, keys and values of a group repeated; the cache is the working set of top_k
  and recent rows, without the quarter. Its rank is the largest of 32, 16, 8, 4 whose factors take at most half, or 4.
- window: the rows of a step are the cache.
- lola: nothing is kept in CPU memory; rows beside the slope state, split as by default. top_k are those of its cache.
- oracle: its scores are those of dense attention and cost nothing. It is a bound, not a method.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_lrqk.evaluation.attention.lola import settings_within
from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.methods.lola.format import MemoryFormat
from vllm_lrqk.methods.lrqk.format import PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

QUEST_PAGE = 16
PUBLISHED_RANKS = (32, 16, 8, 4)


@dataclass(frozen=True)
class Settings:
    """What the methods share."""

    rank: int = 16
    """Of page-local LRQK and key PCA; factors are int8."""
    page_size: int = 256
    """Of page-local LRQK and key PCA."""
    sink_tokens: int = 4
    recent_tokens: int = 64


@dataclass(frozen=True)
class Shape:
    """One layer and request."""

    heads: int
    kv_heads: int
    head_size: int
    item_bytes: int
    prompt_tokens: int
    tokens: int
    """At the end of the run."""

    @classmethod
    def of(cls, qkv: QKV, steps: int) -> "Shape":
        _, kv_heads, head_size = qkv.key.shape
        prompt = qkv.prompt_tokens
        return cls(qkv.query.shape[1], kv_heads, head_size, qkv.key.element_size(), prompt, prompt + steps)

    @property
    def row_bytes(self) -> int:
        """One key and its value, of one KV head."""
        return 2 * self.head_size * self.item_bytes

    @property
    def dense_bytes(self) -> int:
        """All keys and values."""
        return self.tokens * self.kv_heads * self.row_bytes


@dataclass(frozen=True)
class Plan:
    """What a method does with its budget."""

    top_k: int
    """Rows selected per KV head (published: per query head) and step."""
    hot_rows: int
    """Rows of the hot cache per KV head (published: per query head)."""
    device_bytes: int
    rank: int | None = None


Planner = Callable[[Shape, int, Settings], Plan | None]


def _plan(shape: Shape, budget: int, index_bytes: int, always: int, rank: int | None = None) -> Plan | None:
    """Rows per step and cache that fit beside an index; `always` of them are not selected."""
    row_bytes = shape.kv_heads * shape.row_bytes
    hot_rows = min((budget - index_bytes) // row_bytes, shape.tokens)
    attended = shape.tokens if hot_rows == shape.tokens else hot_rows * 4 // 5
    if attended <= always:
        return None
    return Plan(attended - always, hot_rows, index_bytes + hot_rows * row_bytes, rank)


def plan_linear(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """As `plan_pages`, for factor pages with linear values."""
    return plan_pages(shape, budget, settings, LRQKSettings(rank=settings.rank, residual="linear").num_value_ranks)


def plan_pages(shape: Shape, budget: int, settings: Settings, value_rank: int = 0) -> Plan | None:
    """Page-local factors: the index are the factor pages, the open one included, which is always attended."""
    page_format = PageFormat(settings.page_size, shape.head_size, settings.rank, value_rank=value_rank)
    pages = -(-shape.tokens // settings.page_size)
    always = settings.sink_tokens + settings.recent_tokens + settings.page_size
    return _plan(shape, budget, shape.kv_heads * pages * page_format.page_bytes, always, settings.rank)


def plan_published(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """A_K [tokens, r], B_Q and B_K [r, d], and the working set, for each query head."""
    unit = shape.heads * shape.item_bytes
    sizes = {rank: unit * (shape.tokens * rank + 2 * rank * shape.head_size) for rank in PUBLISHED_RANKS}
    rank = next((rank for rank, factors in sizes.items() if factors <= budget // 2), PUBLISHED_RANKS[-1])
    rows = min((budget - sizes[rank]) // (unit * 2 * shape.head_size), shape.prompt_tokens)
    top_k = rows - settings.recent_tokens
    return Plan(top_k, rows, sizes[rank] + rows * unit * 2 * shape.head_size, rank) if top_k > 0 else None


def plan_quest(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """Smallest and largest key, channel by channel, of each page of 16 tokens; top_k are whole pages."""
    pages = -(-shape.tokens // QUEST_PAGE)
    index = shape.kv_heads * pages * 2 * shape.head_size * shape.item_bytes
    plan = _plan(shape, budget, index, QUEST_PAGE)
    if plan is None or plan.top_k < QUEST_PAGE:
        return None
    return Plan(plan.top_k // QUEST_PAGE * QUEST_PAGE, plan.hot_rows, plan.device_bytes)


def plan_random(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """No index."""
    return _plan(shape, budget, 0, settings.sink_tokens + settings.recent_tokens)


def plan_oracle(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """No index; every row is selected."""
    return _plan(shape, budget, 0, 0)


def plan_window(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """No index; the latest rows that fit beside the sinks."""
    row_bytes = shape.kv_heads * shape.row_bytes
    rows = min(budget // row_bytes, shape.tokens)
    window = rows - settings.sink_tokens
    return Plan(window, rows, rows * row_bytes) if window > 0 else None


def plan_lola(shape: Shape, budget: int, settings: Settings) -> Plan | None:
    """Window, cache and state, whatever the length."""
    dtype = torch.float32 if shape.item_bytes == 4 else torch.bfloat16
    found = settings_within(budget // shape.kv_heads, shape.head_size, dtype, settings.sink_tokens)
    if found is None:
        return None
    memory_format = MemoryFormat(found, shape.head_size, dtype)
    return Plan(found.cache, found.ring_rows + found.cache, shape.kv_heads * memory_format.block_bytes)
