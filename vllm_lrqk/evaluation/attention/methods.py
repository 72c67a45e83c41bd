"""The attention methods that are compared, one decode step after the other on one layer and request.

Shapes: H query heads, KV kv heads, L tokens so far, S heads that select (KV; published: H).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vllm_lrqk.evaluation.attention import budgets
from vllm_lrqk.evaluation.attention.budgets import QUEST_PAGE, Plan, Planner, Settings
from vllm_lrqk.evaluation.attention.decoding import PagedLayer
from vllm_lrqk.evaluation.attention.exact import ExactStep
from vllm_lrqk.evaluation.attention.lola import LolaRun, settings_within
from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.evaluation.reference.published_attention import PublishedAttention, PublishedSettings
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@dataclass
class Attended:
    """What one step attended to."""

    output: torch.Tensor
    """float32 [H, d]"""
    rows: torch.Tensor
    """bool [S, L]"""
    always: torch.Tensor
    """bool [S, L], those of `rows` that needed no selection."""


Step = Callable[[ExactStep], Attended]
"""Attends with the next token; every step of a run is called once, in order."""


def positions_mask(rows: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """bool [S, L] from token positions int [S, R], -1 for none."""
    mask = torch.zeros(len(rows), num_tokens + 1, dtype=torch.bool)
    return mask.scatter_(1, torch.where(rows >= 0, rows, num_tokens).long(), True)[:, :num_tokens]


def sinks_and_recent(exact: ExactStep, settings: Settings) -> torch.Tensor:
    """bool [KV, L]"""
    position = torch.arange(exact.num_tokens)
    mask = (position < settings.sink_tokens) | (position >= exact.num_tokens - settings.recent_tokens)
    return mask.expand(exact.kv_heads, -1)


def heaviest_rows(weight: torch.Tensor, count: int) -> torch.Tensor:
    """bool [S, L], the `count` largest of [S, L]."""
    top = weight.topk(min(count, weight.shape[1]), dim=1).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, top, True)


def page_local(qkv: QKV, plan: Plan, settings: Settings, residual: str, factorization: str) -> Step:
    """LRQK as this package serves it, in its plain torch form."""
    config = LRQKSettings(
        rank=settings.rank,
        page_size=settings.page_size,
        top_k=plan.top_k,
        recent_tokens=settings.recent_tokens,
        sink_tokens=settings.sink_tokens,
        residual=residual,
        factorization=factorization,
        hot_rows=plan.hot_rows,
    )
    layer = PagedLayer(qkv, len(qkv.query), config)
    prompt = slice(0, qkv.prompt_tokens)
    layer.append(qkv.key[prompt], qkv.value[prompt])
    num_always = config.attended_rows - config.top_k

    def step(exact: ExactStep) -> Attended:
        i = exact.index
        layer.append(qkv.key[i : i + 1], qkv.value[i : i + 1])
        output, rows = layer.decode(qkv.query[i])
        always = positions_mask(rows[:, -num_always:], exact.num_tokens)
        return Attended(output, positions_mask(rows, exact.num_tokens), always)

    return step


def published(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """LRQK as published, selecting for each query head."""
    assert plan.rank is not None
    prompt = slice(0, qkv.prompt_tokens)
    query, key, value = (x[prompt].transpose(0, 1) for x in (qkv.query, qkv.key, qkv.value))
    state = PublishedAttention(
        query, key, value, PublishedSettings(plan.rank, plan.top_k, recent_tokens=settings.recent_tokens)
    )

    def step(exact: ExactStep) -> Attended:
        i = exact.index
        output = state.decode(qkv.query[i], qkv.key[i], qkv.value[i])
        rows = state.attended_rows(exact.num_tokens)
        always = positions_mask(rows[:, plan.top_k :], exact.num_tokens)
        return Attended(output, positions_mask(rows, exact.num_tokens), always)

    return step


def page_bounds(key: torch.Tensor, page_size: int = QUEST_PAGE) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest key of each full page, channel by channel: two times [KV, P, d] from [L, KV, d]."""
    full = len(key) // page_size * page_size
    pages = key[:full].float().unflatten(0, (-1, page_size))
    return pages.amin(1).transpose(0, 1), pages.amax(1).transpose(0, 1)


def highest_possible(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Upper bounds of q . k over each page's keys: [KV, G, P] from queries [KV, G, d] and bounds [KV, P, d]."""
    return query.clamp_min(0) @ high.mT + query.clamp_max(0) @ low.mT


def quest(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """Whole pages by upper bounds of their scores (Tang et al., ICML 2024, arXiv 2406.10774), and the open page.

    Published for one query head per KV head; a group shares its pages here, by the sum over its heads of the
    softmax of the bounds.
    """
    low, high = page_bounds(qkv.key)

    def step(exact: ExactStep) -> Attended:
        pages = exact.num_tokens // QUEST_PAGE
        query = exact.query.unflatten(0, (exact.kv_heads, -1)) * qkv.key.shape[-1] ** -0.5
        weight = highest_possible(query, low[:, :pages], high[:, :pages]).softmax(-1).sum(1)  # [KV, P]
        chosen = heaviest_rows(weight, plan.top_k // QUEST_PAGE).repeat_interleave(QUEST_PAGE, 1)
        always = (torch.arange(exact.num_tokens) >= pages * QUEST_PAGE).expand(exact.kv_heads, -1)
        rows = always.clone()
        rows[:, : pages * QUEST_PAGE] = chosen
        return Attended(exact.attend(rows), rows, always)

    return step


def window(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """The first and the latest tokens."""

    def step(exact: ExactStep) -> Attended:
        position = torch.arange(exact.num_tokens)
        sinks = position < settings.sink_tokens
        rows = sinks | (position >= exact.num_tokens - plan.top_k)
        rows, sinks = rows.expand(exact.kv_heads, -1), sinks.expand(exact.kv_heads, -1)
        return Attended(exact.attend(rows), rows, sinks)

    return step


def lola(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """LoLA as this package serves it, in its plain torch form."""
    kv_heads, head_size = qkv.key.shape[1:]
    budget = plan.device_bytes // kv_heads
    split = settings_within(budget, head_size, qkv.key.dtype, settings.sink_tokens)
    assert split is not None
    run = LolaRun(qkv, split)

    def step(exact: ExactStep) -> Attended:
        return Attended(run.decode(), *run.attended())

    return step


def random(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """Sinks, recent tokens, and others drawn anew in every step."""
    generator = torch.Generator().manual_seed(0)

    def step(exact: ExactStep) -> Attended:
        always = sinks_and_recent(exact, settings)
        drawn = torch.rand(always.shape, generator=generator).masked_fill(always, -1.0)
        rows = heaviest_rows(drawn, plan.top_k) | always
        return Attended(exact.attend(rows), rows, always)

    return step


def oracle(qkv: QKV, plan: Plan, settings: Settings) -> Step:
    """The tokens with the largest weights of dense attention, summed over the group."""

    def step(exact: ExactStep) -> Attended:
        rows = heaviest_rows(exact.weight_for(exact.kv_heads), plan.top_k)
        return Attended(exact.attend(rows), rows, torch.zeros_like(rows))

    return step


@dataclass(frozen=True)
class Method:
    """A method by its name: how it spends a budget, and how it starts on a sequence's prompt."""

    plan: Planner
    start: Callable[[QKV, Plan, Settings], Step]
    has_residual: bool = False
    is_per_query_head: bool = False


METHODS = {
    "lrqk": Method(budgets.plan_linear, partial(page_local, residual="linear", factorization="lrqk"), True),
    "lrqk-mean": Method(budgets.plan_pages, partial(page_local, residual="mean", factorization="lrqk"), True),
    "lrqk-none": Method(budgets.plan_pages, partial(page_local, residual="none", factorization="lrqk")),
    "key-pca": Method(budgets.plan_linear, partial(page_local, residual="linear", factorization="key_pca"), True),
    "published": Method(budgets.plan_published, published, is_per_query_head=True),
    "quest": Method(budgets.plan_quest, quest),
    "window": Method(budgets.plan_window, window),
    "lola": Method(budgets.plan_lola, lola, has_residual=True),
    "random": Method(budgets.plan_random, random),
    "oracle": Method(budgets.plan_oracle, oracle),
}
