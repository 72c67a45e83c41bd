"""Files of feature maps, in this package's format and in that of LoLCATs checkpoints; the tests make them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace, LayerShape
from vllm_lrqk.methods.lola.feature_maps import load_feature_maps

HEADS, KV_HEADS, HEAD_SIZE, HALF = 8, 2, 16, 4
MODEL = LayerShape(HEADS, KV_HEADS, HEAD_SIZE, "float32", 0.25)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lolcats(prefix: str = "model.", tied: bool = False) -> dict[str, torch.Tensor]:
    tensors = {}
    for layer in range(2):
        name = f"{prefix}layers.{layer}.self_attn."
        tensors[f"{name}feature_map_q.mlp.layer"] = normal(HEADS, HEAD_SIZE, HALF) + layer
        if not tied:
            tensors[f"{name}feature_map_k.mlp.layer"] = normal(HEADS, HEAD_SIZE, HALF) - layer
        tensors[f"{name}window_factors"] = torch.full((1, HEADS, 1, 1), -2.1972245773362196)
        tensors[f"{name}q_proj.weight"] = torch.zeros(3, 3)
    return tensors


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
@pytest.mark.parametrize("form", ["wrapped.pt", "plain.pt", "file.safetensors"])
def test_lolcats_checkpoints(tmp_path, prefix, form):
    tensors, path = lolcats(prefix), tmp_path / form
    if form == "file.safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model_state_dict": tensors, "step": 5} if form == "wrapped.pt" else tensors, path)
    maps = load_feature_maps(str(path), MODEL, LayerPlace(1))
    assert torch.equal(maps.query, tensors[f"{prefix}layers.1.self_attn.feature_map_q.mlp.layer"])
    assert torch.equal(maps.key, tensors[f"{prefix}layers.1.self_attn.feature_map_k.mlp.layer"])
    assert maps.kappa is None
    assert maps.num_features == 2 * HALF
    # The sigmoid of -2.197 is a weight of 1/10 for the softmax part: ten times as much for the linear one.
    assert torch.allclose(maps.bias.exp(), torch.full((HEADS,), 10.0), rtol=1e-5)


def test_tied_maps_serve_queries_and_keys(tmp_path):
    path = tmp_path / "tied.pt"
    torch.save(lolcats(tied=True), path)
    maps = load_feature_maps(str(path), MODEL, LayerPlace(0))
    assert torch.equal(maps.query, maps.key)


def test_own_files_and_ranks(tmp_path):
    """Two ranks share a file: each takes its own heads."""
    path = tmp_path / "maps.safetensors"
    tensors = {
        "layers.0.query_map": normal(2 * HEADS, HEAD_SIZE, HALF),
        "layers.0.key_map": normal(2 * KV_HEADS, HEAD_SIZE, HALF),
        "layers.0.bias": normal(2 * HEADS),
        "layers.0.kappa": normal(2 * HEADS, HEAD_SIZE),
    }
    save_file(tensors, path)
    maps = load_feature_maps(str(path), MODEL, LayerPlace(0, rank=1, ranks=2))
    assert torch.equal(maps.query, tensors["layers.0.query_map"][HEADS:])
    assert torch.equal(maps.key, tensors["layers.0.key_map"][KV_HEADS:])
    assert torch.equal(maps.bias, tensors["layers.0.bias"][HEADS:])
    assert torch.equal(maps.kappa, tensors["layers.0.kappa"][HEADS:])


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (
            {"heads": 12},
            LayerPlace(0),
            r"query map of layer 0 has shape \(8, 16, 4\) where the model needs \(12, 16, 4\)",
        ),
        (
            {"head_size": 64},
            LayerPlace(0),
            r"query map of layer 0 has shape \(8, 16, 4\) where the model needs \(8, 64, 4\)",
        ),
        ({}, LayerPlace(0, ranks=2), r"where the model needs \(16,"),
        ({}, LayerPlace(2), "has no feature maps of layer 2"),
    ],
)
def test_maps_of_another_model_are_refused(tmp_path, change, place, message):
    path = tmp_path / "maps.pt"
    torch.save(lolcats(), path)
    with pytest.raises(ConfigError, match=message) as caught:
        load_feature_maps(str(path), replace(MODEL, **change), place)
    assert str(caught.value).startswith(f"lola.feature_maps is {str(path)!r}, but ")


def test_bad_files_are_refused(tmp_path):
    for name, content in (("a.pt", b"text"), ("a.safetensors", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"is no (checkpoint of torch|safetensors file)"):
            load_feature_maps(str(tmp_path / name), MODEL, LayerPlace(0))
    with pytest.raises(ConfigError, match="there is no such file"):
        load_feature_maps(str(tmp_path / "missing.pt"), MODEL, LayerPlace(0))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds no dictionary"):
        load_feature_maps(str(tmp_path / "list.pt"), MODEL, LayerPlace(0))
