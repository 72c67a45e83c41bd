"""Tokens are counted whatever the positions of a model look like."""

from types import SimpleNamespace

import pytest
import torch

from vllm_lrqk.core.moments import MomentSums
from vllm_lrqk.integration.calibration import CalibrationExtension, rotary_table


@pytest.mark.parametrize("positions", [torch.arange(5), torch.arange(5).expand(3, 5)], ids=["RoPE", "M-RoPE"])
def test_every_token_of_a_step_counts(positions: torch.Tensor) -> None:
    """vLLM pads a step's tensors behind its tokens."""
    extension, sums = CalibrationExtension(), MomentSums(2, 8, 16, None, torch.device("cpu"))
    extension._moment_sums = {"layer": sums}
    extension._keep_positions(torch.nn.Module(), (), {"positions": positions})
    layer = SimpleNamespace(layer_name="layer", head_size=8)
    query, key, value = torch.randn(7, 4 * 8), torch.randn(7, 2 * 8), torch.randn(7, 2 * 8)
    extension._count_tokens(layer, (query, key, value))
    mean, tokens = sums.sums()["key_mean"]
    assert tokens == 5
    torch.testing.assert_close(mean, key[:5].view(5, 2, 8).double().sum(0))


class OtherRotaryEmbedding(torch.nn.Module):
    """A form that nobody has checked."""


def test_forms_of_rope_that_cannot_be_turned_back_are_named() -> None:
    assert rotary_table(None) == (None, "no RoPE")
    assert rotary_table(OtherRotaryEmbedding()) == (None, "OtherRotaryEmbedding")
