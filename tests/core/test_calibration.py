import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vllm_lrqk.core.calibration import CalibrationFile, ModelIdentity, write_calibration
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.moments import Moments
from vllm_lrqk.core.rotary import RotaryTable

FRAMES = RotaryTable.from_base(1e4, 16, 1024).every(256)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def identity(name="tiny", **changes):
    config = CONFIG | changes
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    return ModelIdentity.of(ModelFacts(name, config["head_dim"], *heads, 4096, config))


def moments(seed):
    generator = torch.Generator().manual_seed(seed)
    return Moments(*(torch.randn(2, 16, 16, generator=generator) for _ in range(7)))


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "new" / "tiny.safetensors"
    write_calibration(file, identity(), {0: moments(0), 1: moments(1)}, 4096, 256, FRAMES)
    return file


def test_what_is_written_is_read(path):
    file = CalibrationFile("aqua.calibration", str(path), identity("another/name"))
    assert (file.tokens, file.page_size, file.identity.name) == (4096, 256, "tiny")
    assert file.frames is not None and file.frames.equals(FRAMES)
    for i in range(2):
        for ours, theirs in zip(vars(file.moments(LayerPlace(i), 2)).values(), vars(moments(i)).values()):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rank", "ranks", "head"), [(0, 2, 0), (1, 2, 1), (1, 4, 0), (2, 4, 1)])
def test_a_rank_reads_its_own_heads(path, rank, ranks, head):
    """Two KV heads: one for each of two ranks, or one for two of four."""
    file = CalibrationFile("aqua.calibration", str(path), identity())
    read = file.moments(LayerPlace(1, rank, ranks), 1)
    assert torch.equal(read.page_value_key, moments(1).page_value_key[head : head + 1])


def test_no_partial_file_is_left(path):
    assert not path.with_name(path.name + ".partial").exists()


def test_a_file_without_page_frames_has_the_others(tmp_path):
    path = tmp_path / "file"
    write_calibration(path, identity(), {0: moments(0)}, 10, 256, None, ["MRotaryEmbedding"])
    file = CalibrationFile("aqua.calibration", str(path), identity())
    assert file.frames is None and file.refused == ["MRotaryEmbedding"]
    read = file.moments(LayerPlace(0), 2)
    assert torch.equal(read.query, moments(0).query) and len(read.page_key) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_key_value_heads": 4},
            "made for tiny with 2 layers of 8 query and 2 KV heads of size 16, but other has 2 layers of 8 query and "
            "4 KV heads of size 16: make one with vllm-lrqk calibrate other --output FILE.",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            'made for tiny with RoPE parameters {"rope_theta": 10000.0, "rope_type": "default"}, but other has '
            '{"rope_theta": 500000.0, "rope_type": "default"}: make one',
        ),
        ({"vocab_size": 32000}, f"made for tiny with architecture {identity().fingerprint}, but other has "),
    ],
)
def test_a_file_of_another_model_is_refused_with_both_values(path, changes, message):
    with pytest.raises(ConfigError, match=re.escape(f"aqua.calibration is {str(path)!r}, {message}")):
        CalibrationFile("aqua.calibration", str(path), identity("other", **changes))


def test_the_name_alone_does_not_matter(path):
    assert replace(identity(), name="x") == identity("x")
    CalibrationFile("aqua.calibration", str(path), identity("x"))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ConfigError, match=r"is '.*', which is truncated or damaged \(.*\): make one with vllm-lrqk"):
        CalibrationFile("lrqk.calibration", str(path), identity())


def test_other_refusals_are_sentences(tmp_path, path):
    with pytest.raises(
        ConfigError, match=r"^aqua\.calibration is null, but a calibration file of tiny is needed: make"
    ):
        CalibrationFile("aqua.calibration", None, identity())
    with pytest.raises(ConfigError, match=r"^aqua\.calibration is 'nowhere', which is not a file: make one"):
        CalibrationFile("aqua.calibration", "nowhere", identity())
    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ConfigError, match="which holds 'no calibration' and not 'vllm-lrqk calibration 1': make one"):
        CalibrationFile("aqua.calibration", str(other), identity())
    with pytest.raises(ConfigError, match=re.escape("which has nothing of 9.query: make one")):
        CalibrationFile("aqua.calibration", str(path), identity()).moments(LayerPlace(9), 2)
