import pytest
import torch
from safetensors.torch import save_file

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace, LayerShape
from vllm_lrqk.methods.lola.directions import load_directions, random_directions


def shape(kv_heads: int) -> LayerShape:
    return LayerShape(2 * kv_heads, kv_heads, 16, "float32", 0.25)


@pytest.mark.parametrize(("head_size", "rank"), [(64, 16), (96, 4), (128, 128)])
def test_random_directions_are_orthonormal_and_the_same_for_every_head(head_size, rank):
    directions = random_directions(3, head_size, rank)
    assert directions.key.shape == (3, rank, head_size)
    assert torch.allclose(directions.key @ directions.key.mT, torch.eye(rank).expand(3, -1, -1), atol=1e-6)
    assert torch.equal(directions.query, directions.key)
    assert torch.equal(directions.key[0], directions.key[2])


def test_random_directions_leave_torch_s_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = random_directions(1, 64, 16)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert torch.equal(random_directions(1, 64, 16).key, first.key)


@pytest.fixture
def file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.1.{side}_directions": torch.randn(4, 8, 16, generator=generator) for side in ("query", "key")}
    path = tmp_path / "directions.safetensors"
    save_file(tensors, path)
    return str(path), tensors


def test_a_rank_gets_its_heads_of_a_file(file):
    path, tensors = file
    directions = load_directions(path, shape(2), LayerPlace(1, rank=1, ranks=2), 8)
    assert torch.equal(directions.query, tensors["layers.1.query_directions"][2:])
    assert torch.equal(directions.key, tensors["layers.1.key_directions"][2:])


def test_bad_files_are_refused_in_one_sentence(file, tmp_path):
    path, _ = file
    other = tmp_path / "text.safetensors"
    other.write_text("no tensors")
    cases = [
        ((str(tmp_path / "none"), LayerPlace(1), 8), "there is no such file"),
        ((path, LayerPlace(0), 8), "has no tensor layers.0.query_directions"),
        ((path, LayerPlace(1), 16), r"shape \(4, 8, 16\) where the model and state_rank need \(4, 16, 16\)"),
        ((str(other), LayerPlace(1), 8), "is no safetensors file"),
    ]
    for (name, place, rank), message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            load_directions(name, shape(4), place, rank)
        assert str(caught.value).startswith("lola.directions is ")
        assert str(caught.value).endswith(".")
