"""LoLA (arXiv 2505.23666): window, sparse cache and state in one normalisation; the plain torch form.

    out = ( sum_{W u G} e^{s_i} v_i + M u ) / ( sum_{W u G} e^{s_i} + M ),   s_i = q.k_i scale

with W the window, G the cache, and (log M, u) what the state reads for q. Chunks lie at absolute positions: tokens
wait in the window's ring until it is full and the next token comes; then the oldest `chunk` leave, they and the cache
are scored together, the `cache` best stay exact and the rest is folded into the state. So what a request remembers is
a function of its tokens alone, however they were cut into calls.

Shapes: B requests, H query heads, KV kv heads, K heads of the memory (KV, or H where every query head has a memory of
its own), G = H / K, T tokens, d head size.
"""

from dataclasses import dataclass

import torch

from vllm_lrqk.methods.lola.format import Memory
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import State


@dataclass(frozen=True)
class Rules:
    """How one layer remembers."""

    settings: LolaSettings
    state: State
    scale: float
    """Factor of the attention scores."""


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    blocks: torch.Tensor,
    seq_lens: torch.Tensor,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    """Take in and attend one token per request.

    Args:
        query, output: [B, H, d].
        key, value: [B, KV, d].
        blocks: int [B], the block of each request.
        seq_lens: int [B], the current token included; 0: no request, its output is zero.
    """
    for request, (block, length) in enumerate(zip(blocks.tolist(), seq_lens.tolist())):
        token = slice(request, request + 1)
        if length > 0:
            prefill_attention(query[token], key[token], value[token], memory, block, length - 1, rules, output[token])
        else:
            output[token] = 0


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory: Memory,
    block: int | torch.Tensor,
    context_len: int,
    rules: Rules,
    output: torch.Tensor,
) -> None:
    """Take in and attend the tokens at positions context_len ... context_len + T - 1 of one request.

    Args:
        query, output: [T, H, d].
        key, value: [T, KV, d].
        block: the request's block, a number or a tensor of one; what it holds means nothing if context_len is 0.
    """
    settings, block = rules.settings, int(block)
    copies = memory.heads // key.shape[1]
    rows = torch.stack([key, value], 2).transpose(0, 1).repeat_interleave(copies, 0)  # [K, T, 2, d]
    queries = query.float().unflatten(1, (memory.heads, -1)).permute(1, 2, 0, 3)  # [K, G, T, d]
    updates = settings.updates(context_len)
    start, end = 0, len(query)
    while start < end:
        seen = context_len + start
        if settings.updates(seen + 1) > updates:
            update(memory, block, updates, rules)
            updates += 1
        stop = min(end, start + updates * settings.chunk + settings.ring_rows - seen)
        slots = torch.arange(seen, seen + stop - start, device=query.device) % settings.ring_rows
        memory.ring[block, :, slots] = rows[:, start:stop]
        attended = _attend(queries[:, :, start:stop], memory, block, seen, updates, rules)
        output[start:stop] = attended.permute(2, 0, 1, 3).flatten(1, 2)
        start = stop


def _attend(query: torch.Tensor, memory: Memory, block: int, seen: int, updates: int, rules: Rules) -> torch.Tensor:
    """float32 [K, G, T, d] of query [K, G, T, d], the tokens at positions `seen` and on, whose rows are in the ring."""
    settings = rules.settings
    cached, folded = settings.cached(updates), settings.folded(updates)
    first, tokens = updates * settings.chunk, query.shape[2]
    positions = torch.arange(first, seen + tokens, device=query.device)
    window = memory.ring[block, :, positions % settings.ring_rows]
    rows = torch.cat([memory.cache[block, :, :cached], window], 1).float()  # [K, cached + window, 2, d]
    scores = query @ rows[:, None, :, 0].mT * rules.scale
    is_later = positions > seen + torch.arange(tokens, device=query.device)[:, None]
    scores[..., cached:].masked_fill_(is_later, -torch.inf)
    if folded == 0:
        return scores.softmax(-1) @ rows[:, None, :, 1]
    sums = {name: tensor[block] for name, tensor in memory.sums.items()}
    log_mass, mean = rules.state.read(sums, query, folded, scores.amax(-1))
    weight = torch.cat([scores, log_mass[..., None]], -1).softmax(-1)
    return weight[..., :-1] @ rows[:, None, :, 1] + weight[..., -1:] * mean


def update(memory: Memory, block: int, updates: int, rules: Rules) -> None:
    """The next chunk leaves the window of one request that has had so many updates."""
    settings = rules.settings
    cached, folded, keep = settings.cached(updates), settings.folded(updates), settings.cached(updates + 1)
    device = memory.raw.device
    leaving = torch.arange(updates * settings.chunk, (updates + 1) * settings.chunk, device=device)
    window = memory.ring[block, :, leaving % settings.ring_rows]
    rows = torch.cat([memory.cache[block, :, :cached], window], 1)  # [K, N, 2, d]
    leaving = leaving.int().expand(memory.heads, -1)
    positions = torch.cat([memory.positions[block, :, :cached], leaving], 1)  # [K, N]
    if keep == rows.shape[1]:
        memory.cache[block, :, :keep], memory.positions[block, :, :keep] = rows, positions
        return
    sums = {name: tensor[block] for name, tensor in memory.sums.items()}
    key, value = rows.float().unbind(2)
    score = _scores(sums, key, value, positions, folded, rules)
    score = score.masked_fill(positions < settings.sink_tokens, torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices  # of equal scores the older first
    kept, rest = order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values
    head = torch.arange(memory.heads, device=device)[:, None]
    rules.state.fold(sums, key[head, rest], value[head, rest], folded)
    memory.cache[block, :, :keep], memory.positions[block, :, :keep] = rows[head, kept], positions[head, kept]


def _scores(
    sums: dict[str, torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    folded: int,
    rules: Rules,
) -> torch.Tensor:
    """float32 [K, N], what decides who stays in the cache: larger stays.

    "recall": squared error of what the state recalls for the token's own key; an empty state recalls zero.
    """
    if rules.settings.select == "random":
        return random_scores(positions)
    recalled = rules.state.recall(sums, key, folded) if folded else torch.zeros_like(value)
    return (recalled - value).square().sum(-1)


def random_scores(positions: torch.Tensor) -> torch.Tensor:
    """float32 [K, N] in [0, 1): a hash of head and position, the same whenever it is asked for.

    The mixing function is "lowbias32" of C. Wellons (https://nullprogram.com/blog/2018/07/31/).
    """
    x = positions.long() + torch.arange(len(positions), device=positions.device)[:, None] * 0x9E3779B9 & 0xFFFFFFFF
    x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
    x = x ^ x >> 16
    return (x >> 8).float() * 2**-24
