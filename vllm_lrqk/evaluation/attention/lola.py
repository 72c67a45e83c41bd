"""LoLA's decode steps on one layer, in its plain torch form."""

import torch

from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.methods.lola.attention import Rules, decode_attention, prefill_attention
from vllm_lrqk.methods.lola.directions import Rotary, slow_directions
from vllm_lrqk.methods.lola.format import Memory, MemoryFormat
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lola.state import NoState, SlopeState, State

UNWRITTEN = 0xFF
"""Byte that is NaN in every floating-point type."""
CHUNKS = (64, 32, 16)
LEAST_CHUNKS = 5
"""Chunks that window, chunk and cache hold together, at least."""
WINDOW_SHARE = 0.39
"""Of all rows: 192 of the default's 492."""


def settings_within(budget: int, head_size: int, dtype: torch.dtype, sink_tokens: int) -> LolaSettings | None:
    """As many rows as one KV head's budget of bytes holds beside the slope state, split as the default; None: too few.

    Args:
        budget: bytes of one KV head.
        dtype: of keys and values.
    """
    least = MemoryFormat(LolaSettings(cache=sink_tokens, sink_tokens=sink_tokens), head_size, dtype)
    rows = (budget - least.ring_offset) // least.row_bytes
    chunk = next((chunk for chunk in CHUNKS if rows >= LEAST_CHUNKS * chunk), None)
    if chunk is None:
        return None
    window = max(16, round(WINDOW_SHARE * rows / 16) * 16)
    for cache in range(rows - window - chunk, sink_tokens - 1, -1):  # sections are padded
        settings = LolaSettings(window=window, chunk=chunk, cache=cache, sink_tokens=sink_tokens)
        if MemoryFormat(settings, head_size, dtype).block_bytes <= budget:
            return settings
    return None


class LolaRun:
    """One layer's memory after a prompt, and what its decode steps attend to. `state` is "slope" or "none"."""

    def __init__(self, qkv: QKV, settings: LolaSettings) -> None:
        kv_heads, d = qkv.key.shape[1:]
        self.settings, self._qkv, self._seen = settings, qkv, qkv.prompt_tokens
        form = MemoryFormat(settings, d, qkv.key.dtype)
        raw = torch.full((1, kv_heads, form.block_bytes), UNWRITTEN, dtype=torch.uint8)
        self.memory = Memory(raw, form)
        state: State = NoState()
        if settings.state == "slope":
            state = SlopeState(slow_directions(kv_heads, d, settings.state_rank, Rotary(d)), d**-0.5)
        self._rules = Rules(settings, state, d**-0.5)
        prompt = slice(0, qkv.prompt_tokens)
        output = torch.empty_like(qkv.query[prompt], dtype=torch.float32)
        rows = qkv.key[prompt], qkv.value[prompt]
        prefill_attention(qkv.query[prompt], *rows, self.memory, 0, 0, self._rules, output)

    def decode(self) -> torch.Tensor:
        """Take in the next token: its output, float32 [H, d]."""
        qkv, token = self._qkv, slice(self._seen, self._seen + 1)
        self._seen += 1
        output = torch.empty_like(qkv.query[token], dtype=torch.float32)
        where = torch.tensor([0]), torch.tensor([self._seen])
        rows = qkv.query[token], qkv.key[token], qkv.value[token]
        decode_attention(*rows, self.memory, *where, self._rules, output)
        return output[0]

    def attended(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [KV, L]: the rows of window and cache, and those of them that needed no selection."""
        updates = self.settings.updates(self._seen)
        position = torch.arange(self._seen)
        always = (position >= updates * self.settings.chunk) | (position < self.settings.sink_tokens)
        rows = always.expand(self.memory.heads, -1).clone()
        cached = self.memory.positions[0, :, : self.settings.cached(updates)].long()
        return rows.scatter_(1, cached, True), always.expand(self.memory.heads, -1)


def lola_decode(qkv: QKV, steps: int, settings: LolaSettings) -> tuple[torch.Tensor, int]:
    """The first decode steps: outputs float32 [T, H, d], and the bytes of the memory."""
    run = LolaRun(qkv, settings)
    return torch.stack([run.decode() for _ in range(steps)]), run.memory.raw.nbytes
