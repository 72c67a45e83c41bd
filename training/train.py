"""Train the small language model that the evaluation uses by default.

    python training/train.py FOLDER [--minutes 38] [--start FOLDER] [--threads 2] [--device cpu]

A Llama of 2.3 million parameters (3 layers, 4 query and 2 KV heads of size 64, RoPE, 4,096 tokens of context) learns
from the Python standard library's sources, from the tasks of `vllm_lrqk.evaluation.tasks` and from sequences that
repeat. Contexts grow from 256 to 4,096 tokens while the time goes by; with --start, which continues from a checkpoint,
from 512. Seeds are fixed; how many steps fit into the time depends on the machine. The checkpoint is bfloat16 in
Hugging Face's format, with its tokenizer and, in `training.json`, what it took.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

from corpus import sources  # noqa: E402
from data import FIRST_SHARES, LEARNED, SHARES, Batches  # noqa: E402
from induction import start_with_induction  # noqa: E402
from muon import Muon  # noqa: E402
from tokenizer import VOCAB_SIZE, train_tokenizer  # noqa: E402

from vllm_lrqk.evaluation.tasks import make_sample  # noqa: E402

CONTEXT = 4096
STAGES = ((0.3, 256), (0.45, 512), (0.62, 1024), (0.8, 2048), (1.0, 4096))
CONTINUED_STAGES = ((0.3, 512), (0.65, 1024), (0.85, 2048), (1.0, 4096))
SHORTER_SHARE = 0.35
"""(share of the time until which, longest row) of each stage, and the share of its batches that are of shorter rows."""
COPYING_UNTIL = 0.05
"""Share of the time, when training starts anew."""
TOKENS_PER_STEP = 4096
PEAK_RATE, WARM_UP_STEPS = 0.006, 60
SAVE_EVERY = 200


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--minutes", type=float, default=38.0, help="time to train for")
    parser.add_argument("--start", type=Path, help="a checkpoint of this script to continue from, tokenizer and all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            initializer_range=0.02,
        )
    )


def optimizers_of(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest; both follow one schedule relative to their own rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        Muon(matrices, lr=PEAK_RATE),
        torch.optim.AdamW(others, lr=PEAK_RATE / 6, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def stage_length(stages: Sequence[tuple[float, int]], progress: float, generator: random.Random) -> int:
    longest = next(length for until, length in stages if progress <= until)
    shorter = [length for _, length in stages if length < longest]
    return generator.choice(shorter) if shorter and generator.random() < SHORTER_SHARE else longest


def schedule(step: int, progress: float) -> float:
    """Share of the peak rate: a warm-up, then level, then linear to zero over the last 40 % of the time."""
    return min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, (1.0 - progress) / 0.4 + 0.01)


def losses_of(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted loss of each next token, nats: float32 [rows, length]."""
    logits = model(tokens[:, :-1], use_cache=False).logits.float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return each.view_as(weights) * weights


def train(model: LlamaForCausalLM, batches: Batches, arguments: argparse.Namespace) -> tuple[int, int]:
    """Train for the time given; returns how many steps and tokens that were."""
    generator = random.Random(arguments.seed + 1)
    optimizers = optimizers_of(model)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    recent: dict[str, deque[tuple[float, float]]] = {kind: deque(maxlen=200) for kind in SHARES}
    started, tokens_seen, step = time.monotonic(), 0, 0
    with tqdm(total=100, desc="training", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}") as bar:
        while (progress := (time.monotonic() - started) / (60 * arguments.minutes)) < 1.0:
            length = stage_length(CONTINUED_STAGES if arguments.start else STAGES, progress, generator)
            shares = FIRST_SHARES if progress < COPYING_UNTIL and not arguments.start else SHARES
            tokens, weights, kinds = batches.make(max(1, TOKENS_PER_STEP // length), length, shares)
            losses = losses_of(model, tokens.to(arguments.device), weights.to(arguments.device))
            (losses.sum() / weights.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates):
                optimizer.param_groups[0]["lr"] = rate * schedule(step, progress)
                optimizer.step()
                optimizer.zero_grad()
            step, tokens_seen = step + 1, tokens_seen + weights.numel()
            for row, weight, kind in zip(losses.detach().sum(1).tolist(), weights.sum(1).tolist(), kinds):
                recent[kind].append((row, weight))
            bar.n = round(100 * progress, 1)
            means = [
                f"{kind} {sum(r for r, _ in rows) / sum(w for _, w in rows):.2f}"
                for kind, rows in recent.items()
                if rows
            ]
            bar.set_postfix_str(f"step {step}, {tokens_seen:,} tokens, loss: {', '.join(means)}")
            if step % SAVE_EVERY == 0:
                save(model, batches, arguments.folder)
    return step, tokens_seen


def save(model: LlamaForCausalLM, batches: Batches, folder: Path) -> None:
    """Write the checkpoint in bfloat16."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    batches.tokenizer.save_pretrained(folder)


@torch.inference_mode()
def scores(model: LlamaForCausalLM, batches: Batches, length: int, samples: int = 8) -> dict[str, float]:
    """Share of right tokens of each task's answer, given the ones before it."""
    model.eval()
    result = {}
    for task in LEARNED:
        right = total = 0
        for seed in range(samples):
            try:
                sample = make_sample(task, length, lambda text: len(batches.encode(text)), 10_000 + seed)
            except ValueError:
                break
            prompt, answer = batches.encode(sample.prompt), batches.encode(sample.completion)
            tokens = torch.tensor([prompt + answer], device=model.device)
            found = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
            right += int((found == tokens[0, len(prompt) :]).sum())
            total += len(answer)
        if total:
            result[task] = right / total
    model.train()
    return result


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, batches: Batches, texts: list[str], limit: int = 40_000) -> float:
    """Mean loss per token, nats, of unseen text in windows of the whole context."""
    tokens = [token for text in texts for token in [*batches.encode(text), 0]][:limit]
    losses = []
    for start in range(0, len(tokens) - CONTEXT - 1, CONTEXT):
        window = torch.tensor([tokens[start : start + CONTEXT + 1]], device=model.device)
        losses.append(losses_of(model, window, torch.ones(1, CONTEXT, device=model.device)).mean().item())
    return math.fsum(losses) / len(losses)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    texts = sources(held_out=False)
    if arguments.start:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start)
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
    else:
        tokenizer_texts = texts + [
            make_sample(task, 2048, lambda text: len(text) // 3, seed).prompt for task in LEARNED for seed in range(20)
        ]
        tokenizer = train_tokenizer(tokenizer_texts)
        model = make_model()
        start_with_induction(model)
    batches = Batches(tokenizer, texts, arguments.seed)
    model.to(arguments.device)
    started = time.monotonic()
    steps, tokens = train(model, batches, arguments)
    minutes = (time.monotonic() - started) / 60
    save(model, batches, arguments.folder)
    summary = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": minutes,
        "threads": arguments.threads,
        "steps": steps,
        "tokens": tokens,
        "text_tokens": len(batches.text),
        "held_out_loss": held_out_loss(model, batches, sources(held_out=True)),
        "answer_tokens_right": {str(length): scores(model, batches, length) for length in (512, 1024, 2048, 4096)},
    }
    (arguments.folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
