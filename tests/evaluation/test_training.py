"""The training script of the shipped model: its batches, and that a step learns from them."""

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from vllm_lrqk.evaluation.arguments import SHIPPED_MODEL

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))

import train
from data import FIRST_SHARES, SHARES, Batches

TEXT = "def add(a, b):\n    return a + b\n" * 200


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches(PreTrainedTokenizerFast.from_pretrained(SHIPPED_MODEL), [TEXT], seed=0)


@pytest.mark.parametrize("shares", [SHARES, FIRST_SHARES])
@pytest.mark.parametrize("length", [256, 1024])
def test_rows_of_every_kind(batches: Batches, shares: dict[str, float], length: int) -> None:
    tokens, weights, kinds = batches.make(24, length, shares)
    assert tokens.shape == (24, length + 1) and weights.shape == (24, length)
    assert set(kinds) == set(shares)
    assert int(tokens.min()) >= 0 and int(tokens.max()) < len(batches.tokenizer)
    for row, kind in zip(weights, kinds):
        assert (row > 0).any()
        # Most of a task's tokens are a random text, which says little: its answers weigh more.
        assert (len(set(row.tolist()) - {0.0}) > 1) == (kind == "task")


def test_a_step_lowers_the_loss(batches: Batches) -> None:
    torch.manual_seed(0)
    model = train.make_model()
    train.start_with_induction(model)
    optimizers = train.optimizers_of(model)
    tokens, weights, _ = batches.make(4, 256, SHARES)
    losses = []
    for _ in range(3):
        loss = train.losses_of(model, tokens, weights).sum() / weights.sum()
        losses.append(loss.item())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_stages_grow_to_the_whole_context() -> None:
    generator = random.Random(0)
    for stages in (train.STAGES, train.CONTINUED_STAGES):
        lengths = [train.stage_length(stages, progress / 100, generator) for progress in range(101)]
        assert max(lengths) == train.CONTEXT
        assert max(lengths[:20]) < max(lengths[:50]) < max(lengths)
