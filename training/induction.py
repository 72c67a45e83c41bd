"""A start that can already copy: two heads which continue what was seen before.

Heads that look back one token and heads that look for what followed the same token earlier (Olsson et al., 2022) form
late in training, and a small computer cannot train for many million tokens. Training begins with a rough hand-made
pair of them and changes it like any other weight.
"""

import torch
from transformers import LlamaForCausalLM

PREVIOUS_PAIRS = 12  # rotary pairs of high frequency, which tell the previous token from its neighbours
PREVIOUS_LOGIT = 12.0  # per pair
MATCH_PAIRS = 12  # rotary pairs of low frequency, in which tokens can be compared at any distance
MATCH_LOGIT = 60.0
WRITE_SIZE = 0.2  # keeps what a head writes as large as an embedding
COPY_SIZE = 8.0
CONSTANT = -1
"""The coordinate of the residual stream that is the same for every token."""


@torch.no_grad()
def start_with_induction(model: LlamaForCausalLM) -> None:
    """Set the first heads of the first two layers of `model`, and a constant coordinate of all embeddings."""
    config = model.config
    hidden, size = config.hidden_size, config.head_dim
    half = size // 2
    codes = [*range(half - MATCH_PAIRS, half), *range(size - MATCH_PAIRS, size)]
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=hidden**-0.5)
    constant = 0.25
    embedding[:, CONSTANT] = constant
    # RMSNorm makes every token's norm sqrt(hidden).
    seen_constant = constant / (1 + constant**2) ** 0.5 * hidden**0.5

    projection = torch.randn(len(codes), hidden) / hidden**0.5
    projection[:, CONSTANT] = 0.0
    directions = torch.randn(hidden, len(codes) + size)
    directions[CONSTANT] = 0.0
    directions = torch.linalg.qr(directions).Q  # what the heads write must not look like what they copy
    write, copied = directions[:, : len(codes)], directions[:, len(codes) :]

    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)[:PREVIOUS_PAIRS]
    amplitude = (PREVIOUS_LOGIT * size**0.5) ** 0.5 / seen_constant
    previous = model.model.layers[0].self_attn
    # Rotated by its position, the query equals the key of the position before.
    previous.q_proj.weight[:size] = 0.0
    previous.q_proj.weight[:PREVIOUS_PAIRS, CONSTANT] = amplitude * torch.cos(frequency)
    previous.q_proj.weight[half : half + PREVIOUS_PAIRS, CONSTANT] = -amplitude * torch.sin(frequency)
    previous.k_proj.weight[:size] = 0.0
    previous.k_proj.weight[:PREVIOUS_PAIRS, CONSTANT] = amplitude
    previous.v_proj.weight[:size] = 0.0
    previous.v_proj.weight[codes] = projection
    previous.o_proj.weight[:, codes] = WRITE_SIZE * write

    match = model.model.layers[1].self_attn
    scale = (MATCH_LOGIT * size**0.5 / len(codes)) ** 0.5
    match.q_proj.weight[:size] = 0.0
    match.q_proj.weight[codes] = scale * projection
    match.k_proj.weight[:size] = 0.0
    match.k_proj.weight[codes] = scale * write.T
    match.v_proj.weight[:size] = copied.T
    match.o_proj.weight[:, :size] = COPY_SIZE * copied
