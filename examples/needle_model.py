"""A Llama checkpoint that retrieves by construction: no training, and the right answer is known at every length.

    python examples/needle_model.py FOLDER

Two layers. The residual stream holds [token code | code of the previous token | output | constant]. Layer 0
attends to the previous token and copies its code; layer 1 attends to the token that followed an earlier
occurrence of the current one and copies its code to the output. So the model continues any text that it has
seen before: give it a haystack with a needle sentence in it and the sentence's first word, and it must
repeat the rest. It has to find one token among all; attention that drops that token fails.
"""

import argparse
import math
from pathlib import Path

import torch

VOCAB_SIZE, CODE_SIZE, HIDDEN_SIZE, HEAD_SIZE, NUM_HEADS, NUM_KV_HEADS = 1536, 64, 256, 128, 4, 1
ROPE_THETA = 1e12  # leaves half of the rotary pairs practically unrotated at 128K tokens
PREVIOUS_PAIRS = 12  # high-frequency pairs that make the previous-token head sharp
PREVIOUS_LOGIT = 40.0  # per pair
MATCH_LOGIT = 60.0  # must win against every other token of the context together
CONSTANT = 192
MAX_CONTEXT = 131072

NEEDLES = [
    "grandmother hid her golden compass under seven mossy stones behind our mill",
    "tomorrow captain elliot sails from bristol carrying forty crates of green tea",
    "nobody remembers why the lighthouse keeper painted every single door bright orange",
    "please water my orchid twice weekly until september ends or rain finally comes",
    "professor zhang proved that quiet foxes prefer moonlight over lamps during winter",
]
"""Sentences of distinct words; the first word of each asks for the rest."""


def vocabulary() -> list[str]:
    """The words by token id: unknown, those of the needles, then filler words."""
    words = ["<unknown>", *" ".join(NEEDLES).split()]
    if len(set(words)) != len(words):
        raise ValueError("a word occurs twice in the needles")
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    fillers = (a + b + "x" for a in syllables for b in syllables)
    return words + [next(fillers) for _ in range(VOCAB_SIZE - len(words))]


def haystack(length: int, depths: list[float], seed: int = 0) -> str:
    """A text of `length` words with needle i at `depths[i]` (0 to 1) of it."""
    words = vocabulary()
    first_filler = 1 + len(" ".join(NEEDLES).split())
    generator = torch.Generator().manual_seed(seed)
    needles = [needle.split() for needle, _ in zip(NEEDLES, depths)]
    filler = torch.randint(first_filler, VOCAB_SIZE, (length - sum(map(len, needles)),), generator=generator)
    text = [words[i] for i in filler.tolist()]
    for depth, needle in sorted(zip(depths, needles), reverse=True):
        at = int(len(text) * depth)
        text[at:at] = needle
    return " ".join(text)


def question(text: str, needle: int) -> tuple[str, str]:
    """The prompt that asks for a needle of the text, and the answer."""
    first, rest = NEEDLES[needle].split(" ", 1)
    return f"{text} {first}", rest


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unknown>").save_pretrained(folder)


def _fill_previous_token_layer(attention: torch.nn.Module, frequencies: torch.Tensor) -> None:
    # q is a unit vector per rotary pair turned by -frequency, k the first half-axis: largest at the previous token.
    rms = math.sqrt(2 / HIDDEN_SIZE)
    size = math.sqrt(PREVIOUS_LOGIT * math.sqrt(HEAD_SIZE)) * rms
    for pair in range(PREVIOUS_PAIRS):
        attention.k_proj.weight[pair, CONSTANT] = size
        for head in range(NUM_HEADS):
            row = head * HEAD_SIZE + pair
            attention.q_proj.weight[row, CONSTANT] = size * math.cos(-frequencies[pair])
            attention.q_proj.weight[row + HEAD_SIZE // 2, CONSTANT] = size * math.sin(-frequencies[pair])
    attention.v_proj.weight[:CODE_SIZE, :CODE_SIZE] = torch.eye(CODE_SIZE) * rms
    attention.o_proj.weight[CODE_SIZE : 2 * CODE_SIZE, :CODE_SIZE] = torch.eye(CODE_SIZE)


def _fill_match_layer(attention: torch.nn.Module, frequencies: torch.Tensor) -> None:
    rms = math.sqrt(3 / HIDDEN_SIZE)
    size = math.sqrt(MATCH_LOGIT * math.sqrt(HEAD_SIZE)) * rms
    still = [pair for pair in range(HEAD_SIZE // 2) if frequencies[pair] * MAX_CONTEXT < 0.15]
    dimensions = (still + [pair + HEAD_SIZE // 2 for pair in still])[:CODE_SIZE]
    for code, dimension in enumerate(dimensions):
        attention.k_proj.weight[dimension, CODE_SIZE + code] = size
        for head in range(NUM_HEADS):
            attention.q_proj.weight[head * HEAD_SIZE + dimension, code] = size
    attention.v_proj.weight[:CODE_SIZE, :CODE_SIZE] = torch.eye(CODE_SIZE) * rms
    for head in range(NUM_HEADS):
        columns = slice(head * HEAD_SIZE, head * HEAD_SIZE + CODE_SIZE)
        attention.o_proj.weight[2 * CODE_SIZE : 3 * CODE_SIZE, columns] = torch.eye(CODE_SIZE) / NUM_HEADS


def build(folder: str | Path, sliding_window: int | None = None, seed: int = 0) -> Path:
    """Write checkpoint (float32 safetensors) and tokenizer; with `sliding_window` as a Mistral that forgets."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 1 << 20,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if sliding_window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape)).float()
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=sliding_window)).float()
    frequencies = ROPE_THETA ** (-torch.arange(0, HEAD_SIZE, 2).float() / HEAD_SIZE)
    generator = torch.Generator().manual_seed(seed)
    code = torch.sign(torch.randn(VOCAB_SIZE, CODE_SIZE, generator=generator)) / math.sqrt(CODE_SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :CODE_SIZE] = code
        model.model.embed_tokens.weight[:, CONSTANT] = 1.0
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        _fill_previous_token_layer(model.model.layers[0].self_attn, frequencies)
        _fill_match_layer(model.model.layers[1].self_attn, frequencies)
        model.lm_head.weight[:, 2 * CODE_SIZE : 3 * CODE_SIZE] = code
    folder = Path(folder)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to write the checkpoint")
    print(build(parser.parse_args().folder))
