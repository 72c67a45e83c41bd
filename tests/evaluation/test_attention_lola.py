"""LoLA in the comparison of attention methods."""

from dataclasses import replace

import pytest
import torch

from vllm_lrqk.evaluation.attention.exact import ExactStep
from vllm_lrqk.evaluation.attention.generator import SETS, generate
from vllm_lrqk.evaluation.attention.lola import LolaRun, lola_decode, settings_within
from vllm_lrqk.methods.lola.format import MemoryFormat
from vllm_lrqk.methods.lola.settings import LolaSettings

STEPS = 10


@pytest.fixture(scope="module")
def qkv():
    """900 prompt tokens, 8 query heads, 2 KV heads of size 64."""
    return generate(replace(SETS["s1"], prompt_tokens=900, decode_tokens=STEPS))


def exact_steps(qkv):
    key, value = qkv.key.float().transpose(0, 1), qkv.value.float().transpose(0, 1)
    return [ExactStep(qkv, key, value, index) for index in range(qkv.prompt_tokens, len(qkv.query))]


def test_it_is_dense_attention_where_nothing_leaves(qkv):
    """Its window holds all tokens. Tolerance: float32 sums in another order."""
    output, _ = lola_decode(qkv, STEPS, LolaSettings(window=912, chunk=16, cache=4))
    torch.testing.assert_close(output, torch.stack([e.output for e in exact_steps(qkv)]), rtol=1e-3, atol=1e-4)


def test_it_attends_to_the_rows_that_are_reported(qkv):
    """Without a state its output is attention to them. Tolerance: as above."""
    settings = LolaSettings(window=64, chunk=32, cache=40, state="none")
    run = LolaRun(qkv, settings)
    for exact in exact_steps(qkv):
        output = run.decode()
        rows, always = run.attended()
        assert not (always & ~rows).any() and set(rows.sum(1).tolist()) <= set(range(104, 137))
        torch.testing.assert_close(output, exact.attend(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [30_000, 60_000, 500_000])
def test_it_uses_its_budget(budget):
    settings = settings_within(budget, 64, torch.bfloat16, 4)
    assert settings is not None
    used = MemoryFormat(settings, 64, torch.bfloat16).block_bytes
    assert used <= budget < used + 256 + 2 * 64  # a row, and what is padded


def test_a_budget_of_too_few_rows_has_no_plan():
    assert settings_within(8_000, 64, torch.bfloat16, 4) is None
