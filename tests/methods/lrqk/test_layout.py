"""The page layout that Python, C++ and CUDA share by name, and what the bindings say of one that does not fit."""

import pytest
import torch
from cpu_kernel_cases import INSTRUCTION_SETS, make_layer

from vllm_lrqk.devices.cpu import INSTRUCTION_SETS as ALL_SETS
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat
from vllm_lrqk.methods.lrqk.format import PageFormat
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the CPU kernels are not built")
CONFIG = LRQKSettings(page_size=16, top_k=16, recent_tokens=16)


def names() -> list[str]:
    return torch.ops.vllm_lrqk.cpu_page_layout_names().rstrip(",").split(",")


@pytest.mark.parametrize(
    ("page_format", "lacks", "offsets"),
    [
        (PageFormat(256, 128, 16, torch.int8, 8), {"leading_rank", "has_value_map", "trailing_offset"}, 6),
        (CalibratedFormat(256, 128), {"projection_offset"}, 6),
    ],
)
def test_every_field_is_an_attribute_of_a_format(page_format, lacks, offsets) -> None:
    values = dict(zip(names(), page_format.layout_values(",".join(names()))))
    assert {name for name in names() if not hasattr(page_format, name)} == lacks
    assert values == {name: getattr(page_format, name, 0) for name in names()}
    found = [value for name, value in values.items() if name.endswith("_offset") and name not in lacks]
    assert len(set(found)) == len(found) == offsets
    assert max(found) < values["page_bytes"]


def select(layout: list[int], head_size: int = 64) -> None:
    layer = make_layer([40], CONFIG)
    query = torch.zeros(1, 8, head_size)
    rows = torch.empty(1, 2, 64, dtype=torch.int32)
    sizes = 16, 16, 1.0, 16, 0
    pages = layer.factors.raw, layer.block_table, layer.seq_lens
    index = ALL_SETS.index("portable")
    torch.ops.vllm_lrqk.cpu_select(query, *pages, 0.1, 0.0, layout, *sizes, [], rows, None, None, index)


def layout_with(**changes: int) -> list[int]:
    f = PageFormat.from_config(CONFIG, 64)
    values = dict(zip(names(), f.layout_values(",".join(names()))))
    return list((values | changes).values())


def test_layout_that_fits() -> None:
    select(layout_with())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"page_bytes": 4096}, "page_bytes is 4096, but factors have"),
        ({"rank": 516}, "rank is 516, but must be a multiple of 4, at most 512"),
        ({"rank": 14}, "rank is 14, but must be a multiple of 4"),
        ({"value_rank": 20}, "value_rank is 20, but must be a multiple of 4, at most the rank, 16"),
    ],
)
def test_layout_that_does_not_fit_is_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        select(layout_with(**changes))


def test_short_layout_is_told_its_fields() -> None:
    with pytest.raises(RuntimeError, match=r"page_layout must have 13 values: rank,value_rank"):
        select(layout_with()[:-1])


@pytest.mark.parametrize("head_size", [60, 2048])
def test_head_sizes_that_no_kernel_serves_are_named(head_size: int) -> None:
    with pytest.raises(RuntimeError, match=rf"the head size is {head_size}, but must be a multiple of 8, at most 1024"):
        select(layout_with(), head_size)
