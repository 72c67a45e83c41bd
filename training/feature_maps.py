"""Distil the feature maps of LoLA's `state: "hedgehog"` for the small model, by attention transfer.

    python training/feature_maps.py maps.safetensors [--per-query-head] [--balance largest]

LoLCATs (arXiv 2410.10254), first stage: the model's weights stay; the maps of each layer learn to give softmax
attention's output from the layer's own queries, keys and values, where tokens in the window are attended exactly and
all before it through the maps, in one normalisation. Each step reads a new row of `data.py` and draws queries from it.
The loss is the squared error over the output's square, per query head. Prints it for unseen rows, before and after.

--balance: "query" learns kappa.q + b for the weight of the linear part, "largest" follows the largest score in the
window, as LoLCATs does. --per-query-head gives every query head a map of keys of its own, as published.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import Parameter, ParameterDict
from tqdm import tqdm
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]

from corpus import sources  # noqa: E402
from data import SHARES, Batches  # noqa: E402

from vllm_lrqk.evaluation.arguments import SHIPPED_MODEL  # noqa: E402
from vllm_lrqk.methods.lola.settings import LolaSettings  # noqa: E402
from vllm_lrqk.methods.lola.state import hedgehog_features  # noqa: E402

LEARNING_RATE = 0.02
HELD_OUT_ROWS = 4
BALANCES = ("query", "largest")
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [H, T, d], keys and values [KV, T, d] after RoPE."""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="where the maps go, a safetensors file")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="a Llama with the tokenizer of this folder")
    parser.add_argument("--balance", choices=BALANCES, default="query")
    parser.add_argument("--per-query-head", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=4096, help="of the longest rows; half of them have half of it")
    parser.add_argument("--queries", type=int, default=128, help="positions that are drawn from a row")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


class Reader:
    """A model that shows what its attention layers see."""

    def __init__(self, folder: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._layers: list[Layer] = []
        AttentionInterface.register("shown", self._attend)
        self.model.set_attn_implementation("shown")

    def _attend(self, module, query, key, value, attention_mask, **_: object):
        self._layers.append((query[0], key[0], value[0]))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor) -> list[Layer]:
        """The layers' queries, keys and values for int64 [1, T] tokens."""
        self._layers = []
        self.model.model(tokens, use_cache=False)
        return self._layers


def start_maps(heads: int, key_heads: int, head_size: int, balance: str) -> ParameterDict:
    """Maps of one layer that begin as the identity, named as in the package's files."""
    identity = torch.eye(head_size)
    maps = {
        "query_map": identity.expand(heads, -1, -1).clone(),
        "key_map": identity.expand(key_heads, -1, -1).clone(),
        "bias": torch.zeros(heads),
    }
    if balance == "query":
        maps["kappa"] = torch.zeros(heads, head_size)
    return ParameterDict({name: Parameter(tensor) for name, tensor in maps.items()})


def outputs(
    layer: Layer, maps: ParameterDict, positions: torch.Tensor, settings: LolaSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention and its approximation at int64 [Q] positions: two times float32 [H, Q, d].

    All tokens that have left the window are folded, as in LoLA with `cache` 0.
    """
    query, key, value = layer
    group, scale = len(query) // len(key), query.shape[-1] ** -0.5
    query = query[:, positions]
    every_key = key.repeat_interleave(group, 0)
    every_value = value.repeat_interleave(group, 0)
    scores = query @ every_key.mT * scale  # [H, Q, T]
    token = torch.arange(key.shape[1])
    first = torch.tensor([settings.updates(position + 1) * settings.chunk for position in positions.tolist()])
    is_later, is_folded = token > positions[:, None], token < first[:, None]
    scores = scores.masked_fill(is_later, -torch.inf)
    mapped = key if len(maps["key_map"]) == len(key) else every_key
    features = hedgehog_features(mapped, maps["key_map"]).repeat_interleave(len(query) // len(mapped), 0)
    products = hedgehog_features(query, maps["query_map"]) @ features.mT
    if "kappa" in maps:
        balance = query @ maps["kappa"][..., None]
    else:
        balance = scores.masked_fill(is_folded, -torch.inf).amax(-1, keepdim=True)
    linear = products.log() + balance + maps["bias"][:, None, None]
    hybrid = torch.where(is_folded, linear, scores).softmax(-1) @ every_value
    return scores.softmax(-1) @ every_value, hybrid


def errors(exact: torch.Tensor, hybrid: torch.Tensor) -> torch.Tensor:
    """Squared error over the square: [H] of two times [H, Q, d]."""
    return (hybrid - exact).square().sum((1, 2)) / exact.square().sum((1, 2))


def rows(batches: Batches, length: int) -> Iterator[torch.Tensor]:
    """int64 [1, T], in turns of the whole length and of half of it."""
    while True:
        for part in (length, length // 2):
            yield batches.make(1, part, SHARES)[0][:, :part]


@torch.no_grad()
def held_out_errors(layers: list[list[Layer]], maps: list[ParameterDict], settings: LolaSettings) -> torch.Tensor:
    """[layers, H], the mean over rows and over every eighth query of their second halves."""
    found = []
    for row in layers:
        length = row[0][0].shape[1]
        positions = torch.arange(length // 2, length, 8)
        found.append(torch.stack([errors(*outputs(layer, m, positions, settings)) for layer, m in zip(row, maps)]))
    return torch.stack(found).mean(0)


def main(arguments: list[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    torch.set_num_threads(parsed.threads)
    torch.manual_seed(parsed.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(parsed.model)
    reader = Reader(parsed.model)
    settings = LolaSettings(window=parsed.window, chunk=parsed.chunk)
    unseen = rows(Batches(tokenizer, sources(held_out=True), parsed.seed + 1), parsed.length)
    held_out = [reader.read(next(unseen)) for _ in range(HELD_OUT_ROWS)]
    maps = []
    for query, key, _ in held_out[0]:
        key_heads = len(query) if parsed.per_query_head else len(key)
        maps.append(start_maps(len(query), key_heads, query.shape[-1], parsed.balance))
    before = held_out_errors(held_out, maps, settings)

    optimizer = torch.optim.Adam([p for m in maps for p in m.values()], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, parsed.steps)
    training = rows(Batches(tokenizer, sources(held_out=False), parsed.seed), parsed.length)
    bar = tqdm(range(parsed.steps), desc="distilling")
    for _ in bar:
        row = next(training)
        positions = torch.randint(row.shape[1], (parsed.queries,))
        loss = torch.zeros(())
        for layer, m in zip(reader.read(row), maps):
            layer = tuple(x.clone() for x in layer)  # out of inference mode
            loss = loss + errors(*outputs(layer, m, positions, settings)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"relative squared error {loss.item() / len(maps):.4f}")

    save_file(
        {f"layers.{i}.{name}": p.detach().contiguous() for i, m in enumerate(maps) for name, p in m.items()},
        parsed.file,
    )
    after = held_out_errors(held_out, maps, settings)
    print("Relative squared error on unseen rows, per query head, before -> after:")
    for i, (old, new) in enumerate(zip(before.tolist(), after.tolist())):
        print(f"layer {i}: " + ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in zip(old, new)))


if __name__ == "__main__":
    main()
