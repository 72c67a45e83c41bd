"""What a calibration file must have for LRQK's calibrated factors."""

import re

import pytest
import torch

from vllm_lrqk.core.calibration import CalibrationFile, ModelIdentity, write_calibration
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.moments import Moments
from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.methods.lrqk.calibrated_layer import check_calibration
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

FRAMES = RotaryTable.from_base(1e4, 64, 4096).every(256)
MODEL = ModelFacts("tiny", 64, 8, 2, 4096, {"num_hidden_layers": 1})
LONG_MODEL = ModelFacts("tiny", 64, 8, 2, 4097, {"num_hidden_layers": 1})


@pytest.mark.parametrize(
    ("frames", "refused", "values", "model", "sentence"),
    [
        (
            None,
            ["MRotaryEmbedding", "no RoPE"],
            {},
            MODEL,
            "which has no page frames, as keys of tiny cannot be rotated back with MRotaryEmbedding, no RoPE: "
            'set lrqk.factorization to "lrqk".',
        ),
        (
            None,
            [],
            {},
            MODEL,
            "which has no page frames, as keys of tiny cannot be rotated back with its RoPE: "
            'set lrqk.factorization to "lrqk".',
        ),
        (
            FRAMES,
            [],
            {"page_size": 64},
            MODEL,
            "made for pages of 256 tokens, but lrqk.page_size is 64: make one with vllm-lrqk calibrate tiny "
            "--page-size 64 --output FILE.",
        ),
        (
            FRAMES,
            [],
            {"rank": 40},
            MODEL,
            "lrqk.rank is 40, but calibrated factors have twice as many columns, and the head size of tiny is 64: "
            "set it to 32 or less.",
        ),
        (
            FRAMES,
            [],
            {},
            LONG_MODEL,
            "which knows 4096 positions, but --max-model-len is 4097: lower it.",
        ),
    ],
    ids=["RoPE forms by name", "unnamed form", "page size", "rank", "positions"],
)
def test_a_file_that_does_not_serve_is_refused(tmp_path, frames, refused, values, model, sentence):
    path = tmp_path / "tiny.safetensors"
    moments = Moments(*(torch.zeros(2, 64, 64) for _ in range(7)))
    write_calibration(path, ModelIdentity.of(model), {0: moments}, 100, 256, frames, refused)
    file = CalibrationFile("lrqk.calibration", str(path), ModelIdentity.of(model))
    settings = LRQKSettings.from_dict({"factorization": "calibrated", "calibration": str(path), **values})
    with pytest.raises(ConfigError, match=re.escape(sentence) + "$"):
        check_calibration(file, settings, model)


def test_a_file_that_serves_is_accepted(tmp_path):
    path = tmp_path / "tiny.safetensors"
    moments = Moments(*(torch.zeros(2, 64, 64) for _ in range(7)))
    write_calibration(path, ModelIdentity.of(MODEL), {0: moments}, 100, 256, FRAMES)
    file = CalibrationFile("lrqk.calibration", str(path), ModelIdentity.of(MODEL))
    check_calibration(file, LRQKSettings(factorization="calibrated", calibration=str(path)), MODEL)
