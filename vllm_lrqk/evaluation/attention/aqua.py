"""AQUA's decode steps on one layer, with a basis calibrated on the prompt."""

import torch

from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.methods.aqua.attention import append, decode_attention
from vllm_lrqk.methods.aqua.basis import make_basis
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.settings import AquaSettings

UNWRITTEN = 0xFF
"""Byte that is NaN in every floating-point type."""


def aqua_decode(qkv: QKV, steps: int, config: AquaSettings) -> tuple[torch.Tensor, int]:
    """The first decode steps in the plain torch form: outputs float32 [T, H, d], and the bytes of all blocks."""
    prompt, total = qkv.prompt_tokens, qkv.prompt_tokens + steps
    _, kv_heads, d = qkv.key.shape
    form = BlockFormat.from_config(config, config.block_size, d, qkv.key.dtype)
    num_blocks = -(-total // config.block_size)
    raw = torch.full((num_blocks, kv_heads, form.block_bytes), UNWRITTEN, dtype=torch.uint8)
    key = qkv.key[:prompt].double().transpose(0, 1)
    query = qkv.query[:prompt].double().unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    basis = make_basis(query.mT @ query / prompt, key.mT @ key / prompt, key.mean(1), form.stored)
    blocks, table = Blocks(raw, form), torch.arange(num_blocks)[None]
    append(qkv.key[:total], qkv.value[:total], blocks, basis, torch.arange(total))
    outputs = torch.empty(steps, qkv.query.shape[1], d)
    for step in range(steps):
        lens, query = torch.tensor([prompt + step + 1]), qkv.query[prompt + step][None].float()
        decode_attention(query, blocks, basis, table, lens, d**-0.5, config, outputs[step : step + 1])
    return outputs, raw.nbytes
