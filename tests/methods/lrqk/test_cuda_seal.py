"""Sealing the pages of all layers at once, with emulated copies, against sealing layer by layer."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from emulated import emulated_operators
from launches import launches
from no_waits import no_waits
from pages import empty_factors

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.step import FilledPages
from vllm_lrqk.methods.lrqk import cuda
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.layer import LRQKLayer
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

CONFIG = LRQKSettings(rank=16, page_size=32)
PAGES = torch.tensor([5, 2])
FILLED = FilledPages(PAGES, torch.tensor([0, 3]))
MOST_LAUNCHES = 300


def layers_of(count: int, config: LRQKSettings) -> list[LRQKLayer]:
    generator = torch.Generator().manual_seed(0)
    kernels, counters = cuda.kernels(emulated_operators()), Counters((), count, torch.device("cpu"))
    layers = []
    for _ in range(count):
        host = torch.randn(7, 2, config.page_size, 2, 32, generator=generator)
        factors = empty_factors(config, 32, 7, 2)
        decoder = SimpleNamespace(decodes_one_per_request=True)  # nothing decodes here
        layers.append(LRQKLayer(factors, host, decoder, kernels, 0.1, config, counters))  # type: ignore[arg-type]
    return layers


def scores_of(factors: FactorPages) -> torch.Tensor:
    """Products of the factors, float64 [pages, KV, d, N]: what is compared, as factors may trade signs."""
    scaled = factors.projection[PAGES].double() * factors.projection_scale[PAGES].double()[..., None]
    return scaled.mT @ factors.key_factor(PAGES).double().mT


@pytest.mark.parametrize("value_rank", [None, 8])
@pytest.mark.parametrize("count", [3, 20, 70])  # all pages at once, or one after the other; two copies
def test_the_same_factors_as_layer_by_layer(value_rank: int | None, count: int) -> None:
    config = replace(CONFIG, value_rank=value_rank)
    together, alone = layers_of(count, config), layers_of(count, config)
    LRQKLayer.seal_all(together, FILLED)
    for layer in alone:
        layer.seal(FILLED)
    assert together[0].counters.pages_sealed == alone[0].counters.pages_sealed == count * len(PAGES)
    for a, b in zip(together, alone):
        # Products of other shapes round differently in float32, and then in int8: half a step of 127 at most.
        expected = scores_of(b.factors)
        assert (scores_of(a.factors) - expected).norm() < 0.01 * expected.norm()
        means = a.factors.value_mean[PAGES], b.factors.value_mean[PAGES]
        torch.testing.assert_close(*means)
        untouched = [page for page in range(7) if page not in PAGES.tolist()]
        assert (a.factors.raw[untouched] == 0xFF).all()


@pytest.mark.parametrize("value_rank", [None, 8])
def test_a_page_of_32_layers_takes_few_launches(value_rank: int | None) -> None:
    layers = layers_of(32, replace(CONFIG, value_rank=value_rank))
    with launches() as counts, no_waits(may_allocate=True):
        LRQKLayer.seal_all(layers, FilledPages(PAGES[:1], torch.tensor([0])))
    assert sum(counts.values()) < MOST_LAUNCHES, counts
    assert counts["cuda_gather_layers"] == 1
