"""Requests for the tests of LoLA: memory that nobody has written is NaN in every type."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_lrqk.methods.lola.attention import Rules, decode_attention, prefill_attention
from vllm_lrqk.methods.lola.directions import Directions
from vllm_lrqk.methods.lola.feature_maps import FeatureMaps
from vllm_lrqk.methods.lola.format import Memory, MemoryFormat
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import HedgehogState, NoState, SlopeState, State

KV_HEADS, GROUP, HEAD_SIZE = 2, 2, 16
FEATURES = 8


@dataclass
class Tokens:
    """Queries [T, H, d], keys and values [T, KV, d] of one request."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def __getitem__(self, part: slice) -> "Tokens":
        return Tokens(self.query[part], self.key[part], self.value[part])

    def to(self, dtype: torch.dtype) -> "Tokens":
        return Tokens(self.query.to(dtype), self.key.to(dtype), self.value.to(dtype))


def make_tokens(
    length: int, kv_heads: int = KV_HEADS, group: int = GROUP, head_size: int = HEAD_SIZE, seed: int = 0
) -> Tokens:
    """Keys with a common mean, so that states have something to be wrong about."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    key = normal(length, kv_heads, head_size) + normal(kv_heads, head_size)
    return Tokens(normal(length, kv_heads * group, head_size), key, normal(length, kv_heads, head_size))


def make_maps(
    kv_heads: int = KV_HEADS,
    group: int = GROUP,
    head_size: int = HEAD_SIZE,
    with_kappa: bool = True,
    per_query_head: bool = False,
    features: int = FEATURES,
    seed: int = 1,
) -> FeatureMaps:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = kv_heads * group
    return FeatureMaps(
        normal(heads, head_size, features),
        normal(heads if per_query_head else kv_heads, head_size, features),
        normal(heads),
        0.1 * normal(heads, head_size) if with_kappa else None,
    )


def orthonormal_directions(kv_heads: int, head_size: int, rank: int) -> Directions:
    """Others for each head, and for queries and keys the same."""
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(kv_heads, head_size, rank, generator=generator)).Q
    rows = basis.mT.contiguous()
    return Directions(rows, rows)


def make_rules(
    settings: LolaSettings,
    kv_heads: int = KV_HEADS,
    head_size: int = HEAD_SIZE,
    maps: FeatureMaps | None = None,
) -> Rules:
    scale = head_size**-0.5
    state: State = NoState()
    if settings.state == "slope":
        state = SlopeState(orthonormal_directions(kv_heads, head_size, settings.state_rank), scale)
    elif settings.state == "hedgehog":
        state = HedgehogState(maps or make_maps())
    return Rules(settings, state, scale)


def make_memory(
    settings: LolaSettings,
    blocks: int = 1,
    heads: int = KV_HEADS,
    head_size: int = HEAD_SIZE,
    dtype: torch.dtype = torch.float32,
    fill: int = 0xFF,
    features: int = FEATURES,
) -> Memory:
    """Memory full of one byte; 0xFF is NaN in every floating-point type."""
    memory_format = MemoryFormat(settings, head_size, dtype, 2 * features)
    return Memory(torch.full((blocks, heads, memory_format.block_bytes), fill, dtype=torch.uint8), memory_format)


def run(
    rules: Rules,
    tokens: Tokens,
    cuts: list[int] | tuple[int, ...] = (),
    memory: Memory | None = None,
    block: int = 0,
    decode_from: int | None = None,
) -> tuple[torch.Tensor, Memory]:
    """Output [T, H, d] of a prompt that comes in pieces, and single tokens from `decode_from` on."""
    if memory is None:
        memory = make_memory(rules.settings, heads=tokens.key.shape[1], head_size=tokens.key.shape[2])
    length = len(tokens.key)
    end = length if decode_from is None else decode_from
    output = torch.full_like(tokens.query, torch.nan)
    for start, stop in pairwise([0, *cuts, end]):
        part = tokens[start:stop]
        prefill_attention(part.query, part.key, part.value, memory, block, start, rules, output[start:stop])
    for i in range(end, length):
        part, lens = tokens[i : i + 1], torch.tensor([i + 1], dtype=torch.int32)
        blocks = torch.tensor([block], dtype=torch.int32)
        decode_attention(part.query, part.key, part.value, memory, blocks, lens, rules, output[i : i + 1])
    return output, memory


def causal_softmax(tokens: Tokens) -> torch.Tensor:
    """Exact attention, [T, H, d]."""
    length, kv_heads = tokens.key.shape[:2]
    query = tokens.query.double().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    key, value = (x.double().transpose(0, 1)[:, None] for x in (tokens.key, tokens.value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(1, 2).float()


def kept_positions(memory: Memory, length: int, block: int = 0) -> torch.Tensor:
    """int32 [K, cached], positions in the cache after so many tokens."""
    settings = memory.format.settings
    return memory.positions[block, :, : settings.cached(settings.updates(length))]
