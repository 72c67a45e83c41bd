"""The script that distils feature maps: what it trains is what is served, and training lowers its error."""

import sys
from pathlib import Path

import pytest
import torch
from lola_cases import make_maps, make_rules, make_tokens, run
from torch.nn import Parameter, ParameterDict

from vllm_lrqk.core.layer import LayerPlace, LayerShape
from vllm_lrqk.methods.lola.feature_maps import load_feature_maps
from vllm_lrqk.methods.lola.settings import LolaSettings

sys.path.append(str(Path(__file__).resolve().parents[2] / "training"))

import feature_maps


@pytest.mark.parametrize("with_kappa", [True, False])
@pytest.mark.parametrize("per_query_head", [True, False])
def test_the_trained_form_is_the_served_one(with_kappa, per_query_head):
    """At every position. Tolerance: float32, of features from 1e-12 to 1."""
    settings = LolaSettings(window=16, chunk=16, cache=0, sink_tokens=0, state="hedgehog", feature_maps="maps")
    maps = make_maps(with_kappa=with_kappa, per_query_head=per_query_head)
    tokens = make_tokens(100)
    memory_tokens = tokens
    if per_query_head:  # a memory for every query head
        memory_tokens = type(tokens)(tokens.query, *(x.repeat_interleave(2, 1) for x in (tokens.key, tokens.value)))
    served, _ = run(make_rules(settings, maps=maps), memory_tokens)
    names = {"query_map": maps.query, "key_map": maps.key, "bias": maps.bias, "kappa": maps.kappa}
    trained = ParameterDict({name: Parameter(x) for name, x in names.items() if x is not None})
    layer = tuple(x.transpose(0, 1) for x in (tokens.query, tokens.key, tokens.value))
    with torch.no_grad():
        exact, hybrid = feature_maps.outputs(layer, trained, torch.arange(100), settings)
    torch.testing.assert_close(hybrid.transpose(0, 1), served, rtol=1e-4, atol=1e-4)
    assert feature_maps.errors(exact, hybrid).min() > 0.01


@pytest.mark.parametrize("options", [[], ["--per-query-head", "--balance", "largest"]], ids=["shared", "published"])
def test_training_lowers_the_error_and_writes_the_package_s_format(tmp_path, capsys, options):
    path = tmp_path / "maps.safetensors"
    feature_maps.main([str(path), "--steps", "8", "--length", "512", "--threads", "1", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    pairs = [[float(x) for x in part.split(" -> ")] for line in lines for part in line.split(": ")[1].split(", ")]
    before, after = torch.tensor(pairs).T
    assert len(lines) == 3
    assert after.mean() < 0.97 * before.mean()
    for layer in range(3):
        maps = load_feature_maps(str(path), LayerShape(4, 2, 64, "float32", 0.125), LayerPlace(layer))
        assert maps.key.shape == (4 if options else 2, 64, 64)
        assert (maps.kappa is None) == bool(options)
        assert not torch.equal(maps.query, torch.eye(64).expand(4, -1, -1))
