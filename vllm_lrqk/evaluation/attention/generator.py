"""Synthetic queries, keys and values that resemble one attention layer of a language model after RoPE.

Before RoPE a key is the sum of: a mean with a few massive channels in the lowest-frequency pairs, a mean in
mid-frequency pairs, low-rank content with a power-law spectrum (recurring topics and heavy-tailed tokens),
and noise. The four first tokens are sinks: a larger massive component, values near zero. About 2 % of the tokens
(delimiters) have a smaller bonus of the same kind.

A query is content interest that drifts slowly (AR(1), pulled to the topic of its segment), plus a component
along the mid-frequency key mean (its score decays with distance), plus one along the massive channels
(calibrated to a softmax mass of the sinks), plus noise. Needles are short spans with content and values of their
own; while decoding, the interest of the retrieval heads turns to one of them for 10 to 24 steps at a time.

A set is the same on every machine up to rounding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_lrqk.evaluation.attention.qkv import QKV

TOPICS = 12
SINKS = 4


@dataclass(frozen=True)
class QKVSet:
    """Shape and statistics of one set."""

    head_size: int
    heads: int
    kv_heads: int
    prompt_tokens: int
    decode_tokens: int
    rope_base: float
    seed: int
    jump_rate: float
    """Share of tokens at which a head's interest is drawn anew."""
    content_rank: int
    spectrum_decay: float
    """Exponent of the power law of the content's singular values."""
    needles: int
    coherence: float = 0.97
    """AR(1) coefficient of a head's interest."""
    noise: float = 0.25

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.decode_tokens


SETS = {
    "s1": QKVSet(64, 8, 2, 2048, 128, 1e4, 101, jump_rate=0.0, content_rank=20, spectrum_decay=0.6, needles=4),
    "s2": QKVSet(128, 8, 2, 4096, 192, 5e5, 202, jump_rate=0.01, content_rank=28, spectrum_decay=0.7, needles=6),
    "s3": QKVSet(128, 16, 2, 8192, 128, 5e5, 303, jump_rate=0.01, content_rank=28, spectrum_decay=0.7, needles=6),
    "s4": QKVSet(64, 16, 2, 6144, 128, 5e5, 404, jump_rate=0.01, content_rank=20, spectrum_decay=0.6, needles=4),
}


class HeadRole(NamedTuple):
    """What a query head is calibrated to: logits, and a softmax mass."""

    content_std: float
    recency_at_distance_0: float
    sink_mass: float
    needle: float


RETRIEVAL = HeadRole(2.3, 2.0, 0.35, 10.0)
LOCAL = HeadRole(1.1, 7.5, 0.25, 2.0)
SINK = HeadRole(1.2, 2.5, 0.70, 3.0)
DIFFUSE = HeadRole(1.0, 1.0, 0.30, 2.0)
MIXED = HeadRole(1.9, 4.0, 0.45, 7.0)
ROLES = (RETRIEVAL, LOCAL, MIXED, SINK, RETRIEVAL, DIFFUSE, MIXED, LOCAL)


def generate(spec: QKVSet) -> QKV:
    """Queries, keys and values of one set."""
    source = _Source(spec.seed)
    tokens = _Tokens(spec, source)
    heads = [_KVHead(spec, source, tokens) for _ in range(spec.kv_heads)]
    query = _queries(spec, source, tokens, heads)
    key, value = (torch.stack(parts, 1) for parts in ([h.key for h in heads], [h.value for h in heads]))
    return QKV(query.bfloat16(), key.bfloat16(), value.bfloat16(), spec.prompt_tokens)


def rope(vectors: torch.Tensor, position: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding, half-split (NeoX): float32 [L, d] at int64 [L]."""
    half = vectors.shape[-1] // 2
    angle = position.double()[:, None] * base ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class _Source:
    """Random numbers of one set."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator)

    def integer(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=self.generator)

    def length(self, least: int, spread: int) -> int:
        return int(least + spread * self.uniform(1).item())


class _Tokens:
    """Content of the tokens, shared by all heads: topics, needles, delimiters."""

    def __init__(self, spec: QKVSet, source: _Source) -> None:
        total, rank = spec.tokens, spec.content_rank
        self.topics = source.normal(TOPICS, rank)
        self.topic_of = torch.zeros(total, dtype=torch.long)
        start = 0
        while start < total:
            length = source.length(48, 200)
            self.topic_of[start : start + length] = source.integer(TOPICS, 1)
            start += length
        spectrum = torch.arange(1, rank + 1).float().pow(-spec.spectrum_decay)
        self.spectrum = spectrum / spectrum.norm() * math.sqrt(rank) * 0.9
        amplitude = torch.exp(0.35 * source.normal(total, 1))
        self.content = 0.65 * self.topics[self.topic_of] + 0.76 * amplitude * source.normal(total, rank)
        self.needle_direction = torch.nn.functional.normalize(source.normal(spec.needles, rank), dim=1)
        self.needle_spans = []
        for j in range(spec.needles):
            first = int(spec.prompt_tokens * (0.06 + 0.88 * (j + source.uniform(1).item()) / spec.needles))
            end = min(first + source.length(4, 5), spec.prompt_tokens - 64)
            own = self.needle_direction[j] * math.sqrt(rank) * 1.3
            self.content[first:end] = 0.4 * source.normal(end - first, rank) + own
            self.needle_spans.append((first, end))
        self.is_delimiter = source.uniform(total) < 0.02
        self.position = torch.arange(total)


class _KVHead:
    """Keys (after RoPE) and values of one KV head, float32 [L, d], and the directions its queries need."""

    def __init__(self, spec: QKVSet, source: _Source, tokens: _Tokens) -> None:
        d, rank, total = spec.head_size, spec.content_rank, spec.tokens
        pairs = d // 2
        pair = torch.arange(pairs).float()
        # Content survives RoPE in the low-frequency pairs.
        strength = torch.sigmoid((pair - 0.35 * pairs) / (0.08 * pairs)) * 0.93 + 0.07
        strength = torch.cat([strength, strength])
        basis, _ = torch.linalg.qr(source.normal(d, rank) * strength[:, None])
        self.mixing = basis * tokens.spectrum  # [d, rank]

        first_low = int(0.86 * pairs)
        amplitude = torch.zeros(pairs)
        massive_pairs = first_low + torch.randperm(pairs - first_low, generator=source.generator)[:3]
        amplitude[massive_pairs] = 6 + 8 * source.uniform(3)
        self.massive = _on_circles(amplitude, source)
        is_mid = (pair > 0.08 * pairs) & (pair < 0.55 * pairs)
        self.mid_mean = _on_circles(torch.where(is_mid, 0.5 + 0.5 * source.uniform(pairs), torch.zeros(pairs)), source)
        other_mean = 0.3 * source.normal(d)

        spread = spec.noise * (1.0 + 0.8 * (1 - strength))
        content = tokens.content @ self.mixing.T
        key = content + spread * source.normal(total, d) + self.mid_mean + other_mean
        key = key + self.massive * (1 + 0.03 * source.normal(total, 1))
        bonus = torch.zeros(total)
        bonus[0], bonus[1:SINKS] = 1.0, 0.55
        bonus[tokens.is_delimiter] = bonus[tokens.is_delimiter].clamp_min(0.22)
        key = key + bonus[:, None] * self.massive * 0.9
        self.key = rope(key, tokens.position, spec.rope_base)
        self.rotated_content = rope(content, tokens.position, spec.rope_base)

        value_mixing = source.normal(d, rank) / math.sqrt(rank)
        self.value = 0.7 * tokens.content @ value_mixing.T + 0.7 * source.normal(total, d)
        for first, end in tokens.needle_spans:
            self.value[first:end] = self.value[first:end] * 0.5 + 2.0 * source.normal(1, d)
        self.value[0] *= 0.03
        self.value[1:SINKS] *= 0.15


def _on_circles(amplitude: torch.Tensor, source: _Source) -> torch.Tensor:
    """A vector whose RoPE pairs have the given amplitudes and random phases."""
    phase = 2 * math.pi * source.uniform(len(amplitude))
    return torch.cat([amplitude * phase.cos(), amplitude * phase.sin()])


def _needle_schedule(spec: QKVSet, source: _Source) -> torch.Tensor:
    """int64 [L], the needle that each token looks for, -1 for none; the end of the prompt asks for 0 and 1."""
    wanted = torch.full((spec.tokens,), -1, dtype=torch.long)
    wanted[spec.prompt_tokens - 24 : spec.prompt_tokens - 12] = 0
    wanted[spec.prompt_tokens - 12 : spec.prompt_tokens] = 1 % spec.needles
    start = spec.prompt_tokens
    while start < spec.tokens:
        quiet, length = source.length(4, 12), source.length(10, 15)
        wanted[start + quiet : start + quiet + length] = source.integer(spec.needles, 1)
        start += quiet + length
    return wanted


def _queries(spec: QKVSet, source: _Source, tokens: _Tokens, kv_heads: list[_KVHead]) -> torch.Tensor:
    """Queries after RoPE: float32 [L, H, d]."""
    wanted = _needle_schedule(spec, source)
    group = spec.heads // spec.kv_heads
    draws = [_InterestDraws(spec, source) for _ in range(spec.heads)]
    interest = _interest(spec, tokens, draws)
    roles = [ROLES[h % len(ROLES)] for h in range(spec.heads)]
    heads = [
        _query_head(spec, tokens, kv_heads[h // group], roles[h], draws[h], interest[h], wanted)
        for h in range(spec.heads)
    ]
    return torch.stack(heads, 1)


class _InterestDraws:
    """Everything random about one query head."""

    def __init__(self, spec: QKVSet, source: _Source) -> None:
        total, rank = spec.tokens, spec.content_rank
        self.jitter = 0.85 + 0.3 * source.uniform(4)
        self.first = source.normal(rank)
        self.steps = source.normal(total, rank)
        self.jumps = source.uniform(total) < spec.jump_rate
        self.jump_topic = source.integer(TOPICS, total)
        self.restarts = torch.zeros(total, rank)
        for index in self.jumps.nonzero()[:, 0].tolist():
            self.restarts[index] = source.normal(rank)
        self.noise = 0.25 * source.normal(total, spec.head_size)


def _interest(spec: QKVSet, tokens: _Tokens, draws: list[_InterestDraws]) -> torch.Tensor:
    """Content interest of all query heads: float32 [H, L, content_rank]."""
    jumps = torch.stack([draw.jumps for draw in draws])  # [H, L]
    restarts = torch.stack([draw.restarts for draw in draws])
    steps = math.sqrt(1 - spec.coherence**2) * torch.stack([draw.steps for draw in draws])
    drift, state = torch.empty_like(steps), torch.stack([draw.first for draw in draws])
    for i in range(spec.tokens):
        state = spec.coherence * torch.where(jumps[:, i, None], restarts[:, i], state) + steps[:, i]
        drift[:, i] = state
    # The topic that pulls: the segment's, until a jump inside the segment draws another.
    new_segment = torch.ones(spec.tokens, dtype=torch.bool)
    new_segment[1:] = tokens.topic_of[1:] != tokens.topic_of[:-1]
    jump_topic = torch.stack([draw.jump_topic for draw in draws])
    topic = torch.where(jumps, jump_topic, tokens.topic_of)
    last_change = torch.where(new_segment | jumps, tokens.position, 0).cummax(1).values
    return 0.7 * tokens.topics[topic.gather(1, last_change)] + 0.7 * drift


def _query_head(
    spec: QKVSet,
    tokens: _Tokens,
    kv_head: _KVHead,
    role: HeadRole,
    draw: _InterestDraws,
    interest: torch.Tensor,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """Queries of one head after RoPE, calibrated to its role: float32 [L, d]."""
    content_std, recency, sink_mass, needle = (torch.tensor(role) * draw.jitter).tolist()
    scale = spec.head_size**-0.5
    sample = torch.arange(spec.prompt_tokens // 2, spec.prompt_tokens, max(1, spec.prompt_tokens // 64))
    is_future = tokens.position[None] > sample[:, None]

    content = interest @ kv_head.mixing.T
    logits = rope(content[sample], sample, spec.rope_base) @ kv_head.rotated_content.T * scale
    spread = torch.stack([row[~future].std() for row, future in zip(logits, is_future)]).mean()
    query = content * (content_std / spread)
    for j, (first, end) in enumerate(tokens.needle_spans):
        looking = (wanted == j).nonzero()[:, 0]
        direction = kv_head.mixing @ tokens.needle_direction[j]
        unit_logit = float((tokens.content[first:end] @ kv_head.mixing.T @ direction).mean()) * scale
        query[looking] = 0.5 * query[looking] + (needle / unit_logit) * direction
    mid = kv_head.mid_mean
    query = query + mid * (recency / scale / (mid @ mid))

    massive = kv_head.massive / kv_head.massive.norm()
    logits = rope(query[sample], sample, spec.rope_base) @ kv_head.key.T * scale
    sink_logits = rope(massive.expand(len(sample), -1), sample, spec.rope_base) @ kv_head.key.T * scale
    low, high = 0.0, 60.0
    for _ in range(40):
        middle = (low + high) / 2
        weight = (logits + middle * sink_logits).masked_fill(is_future, -torch.inf).softmax(-1)
        low, high = (middle, high) if float(weight[:, :SINKS].sum(1).mean()) < min(sink_mass, 0.85) else (low, middle)
    return rope(query + massive * middle + draw.noise, tokens.position, spec.rope_base)
