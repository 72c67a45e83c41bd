"""Every kernel of this machine against its plain torch form: one layer serves a prompt and decodes from it, twice."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.layer import Layer, LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.step import build_step, filled_pages
from vllm_lrqk.devices import cpu
from vllm_lrqk.doctor.finding import REBUILD, Finding
from vllm_lrqk.methods.aqua import cpu as aqua_cpu
from vllm_lrqk.methods.aqua import kernels as aqua_kernels
from vllm_lrqk.methods.aqua.basis import make_basis
from vllm_lrqk.methods.aqua.format import BlockFormat, Blocks
from vllm_lrqk.methods.aqua.layer import AquaLayer
from vllm_lrqk.methods.aqua.settings import AquaSettings
from vllm_lrqk.methods.lola import dispatch as lola_dispatch
from vllm_lrqk.methods.lola.method import Lola
from vllm_lrqk.methods.lola.settings import LolaSettings
from vllm_lrqk.methods.lrqk import dispatch as lrqk_dispatch
from vllm_lrqk.methods.lrqk.method import LRQK
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

TOLERANCE = 0.02
"""Of the norm of the outputs, prefilled and decoded tokens apart: rounding moves a row of nearly equal weight in or out
of a selection (3e-3 here); an error of a kernel is of the order of the outputs."""
HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 64
PAGE, PROMPT, STEPS = 64, 600, 40
PREFILLED, DECODED = slice(PROMPT), slice(PROMPT, None)
SHAPE = LayerShape(HEADS, KV_HEADS, HEAD_SIZE, "float32", HEAD_SIZE**-0.5)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tokens:
    query: torch.Tensor
    """[T, HEADS, HEAD_SIZE]"""
    key: torch.Tensor
    """[T, KV_HEADS, HEAD_SIZE]"""
    value: torch.Tensor


def make_tokens() -> Tokens:
    """Keys of low rank plus noise, so that scores spread."""
    generator = torch.Generator().manual_seed(0)
    count = PROMPT + STEPS

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    basis = normal(KV_HEADS, 6, HEAD_SIZE)
    key = torch.einsum("tkr,krd->tkd", normal(count, KV_HEADS, 6), basis) + 0.3 * normal(count, KV_HEADS, HEAD_SIZE)
    return Tokens(normal(count, HEADS, HEAD_SIZE), key, normal(count, KV_HEADS, HEAD_SIZE))


def make_lrqk(name: str) -> Layer:
    method = LRQK(LRQKSettings(page_size=PAGE, top_k=128, recent_tokens=16), "cpu")
    plan, pages = method.plan(HEAD_SIZE, torch.float32, HEADS // KV_HEADS), -(-(PROMPT + STEPS) // PAGE) + 1
    blocks = torch.zeros(pages, KV_HEADS, plan.block_bytes, dtype=torch.uint8)
    host = torch.zeros(pages, KV_HEADS, PAGE, 2, HEAD_SIZE)
    with lrqk_dispatch.force_kernels(name):
        return _make(method, LayerMemory(blocks, None, host))


def make_lola(name: str) -> Layer:
    method = Lola(LolaSettings(window=64, chunk=32, cache=64), "cpu")
    plan = method.plan(HEAD_SIZE, torch.float32, HEADS // KV_HEADS)
    blocks = torch.zeros(2, KV_HEADS, plan.block_bytes, dtype=torch.uint8)
    with lola_dispatch.force_kernels(name):
        return _make(method, LayerMemory(None, blocks, None))


def make_aqua(name: str) -> Layer:
    config, tokens = AquaSettings(block_size=PAGE), make_tokens()
    form = BlockFormat.from_config(config, PAGE, HEAD_SIZE, torch.float32)
    grouped = tokens.query.unflatten(1, (KV_HEADS, -1))
    gram_query = torch.einsum("tkgd,tkge->kde", grouped, grouped) / len(grouped)
    gram_key = torch.einsum("tkd,tke->kde", tokens.key, tokens.key) / len(grouped)
    basis = make_basis(gram_query, gram_key, tokens.key.mean(0), form.stored)
    blocks = torch.zeros(-(-(PROMPT + STEPS) // PAGE) + 1, KV_HEADS, form.block_bytes, dtype=torch.uint8)
    table = aqua_kernels.TORCH if name == "torch" else aqua_cpu.kernels(name)
    return AquaLayer(Blocks(blocks, form), basis, SHAPE.scale, config, table)


def _make(method: LRQK | Lola, memory: LayerMemory) -> Layer:
    counters = Counters(method.tallies, 1, CPU)
    return method.make_layer(SHAPE, LayerPlace(), memory, None, counters, counters.tallies[0], CPU)


LAYERS: dict[str, Callable[[str], Layer]] = {"LRQK": make_lrqk, "LOLA": make_lola, "AQUA": make_aqua}


def serve(layer: Layer, tokens: Tokens) -> torch.Tensor:
    """Outputs [T, HEADS, HEAD_SIZE] of a prompt in two chunks, then of single tokens."""
    table = torch.arange(1, -(-(PROMPT + STEPS) // PAGE) + 1, dtype=torch.int32)[None]
    own, output = torch.tensor([[1]], dtype=torch.int32), torch.full_like(tokens.query, torch.nan)
    cuts = [0, PROMPT // 2 + 7, *range(PROMPT, PROMPT + STEPS + 1)]
    for start, end in pairwise(cuts):
        positions = torch.arange(start, end)
        slots = table[0, positions // PAGE].long() * PAGE + positions % PAGE
        step = build_step([0, end - start], [end], table, torch.tensor([end], dtype=torch.int32), slots, PAGE)
        of = slice(start, end)
        layer.forward(tokens.query[of], tokens.key[of], tokens.value[of], step, own, output[of])
        filled = filled_pages(step)
        if filled is not None:
            layer.seal(filled)
    return output


def findings() -> Iterator[Finding]:
    """One finding per method, over all instruction sets; a few seconds."""
    sets, tokens = cpu.instruction_sets(), make_tokens()
    for method, make in LAYERS.items():
        yield check(method, make, sets, tokens)


def check(method: str, make: Callable[[str], Layer], sets: tuple[str, ...], tokens: Tokens) -> Finding:
    """Whether the kernels of all these instruction sets agree with plain torch."""
    topic = f"{method} self-test"
    expected = serve(make("torch"), tokens)
    if not bool(expected.isfinite().all()):
        return Finding(topic, "problem", "plain torch gives no numbers", "install this torch again")
    errors = {}
    for name in sets:
        try:
            output = serve(make(name), tokens)
        except (RuntimeError, AttributeError) as error:  # a library of another version has other operators
            reason = str(error).splitlines()[0][:120]
            return Finding(topic, "problem", f"the {name} kernels cannot be called ({reason})", REBUILD)
        parts = ((output[of] - expected[of]).norm() / expected[of].norm() for of in (PREFILLED, DECODED))
        errors[name] = max(float(part.nan_to_num(torch.inf)) for part in parts)
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) or "plain torch alone"
    bad = [name for name, error in errors.items() if not error < TOLERANCE]
    if bad:
        return Finding(topic, "problem", f"off from plain torch by {text}", f"{REBUILD}; if it stays, report it")
    return Finding(topic, "fine", f"off from plain torch by {text}" if errors else text)
