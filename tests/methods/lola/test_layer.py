"""A layer of LoLA as vLLM's integration calls it: a batch of single tokens and prompt pieces over shared blocks."""

import pytest
import torch
from lola_cases import GROUP, HEAD_SIZE, KV_HEADS, make_maps, make_tokens
from safetensors.torch import save_file

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace, LayerShape
from vllm_lrqk.core.step import build_step
from vllm_lrqk.methods.lola.layer import LolaLayer, memory
from vllm_lrqk.methods.lola.settings import LolaSettings

HEADS = KV_HEADS * GROUP
SMALL = {"window": 16, "chunk": 16, "cache": 24, "state_rank": 4}


def make_layer(settings: LolaSettings, blocks: int = 4) -> LolaLayer:
    size = memory(settings, HEAD_SIZE, torch.float32, GROUP)
    raw = torch.full((blocks, KV_HEADS, size), 0xFF, dtype=torch.uint8)
    return LolaLayer(raw, LayerShape(HEADS, KV_HEADS, HEAD_SIZE, "float32", HEAD_SIZE**-0.5), settings, LayerPlace())


def run_step(layer, pieces, request_blocks):
    """pieces: (tokens, first position, past the last position) of each request; single tokens first."""
    parts = [tokens[start:end] for tokens, start, end in pieces]
    query, key, value = (torch.cat([getattr(part, name) for part in parts]) for name in ("query", "key", "value"))
    counts, lens = [end - start for _, start, end in pieces], [end for _, _, end in pieces]
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    slots = torch.full((len(query),), -1)
    step = build_step(starts, lens, torch.zeros(len(lens), 1).int(), torch.tensor(lens).int(), slots, 64)
    output = torch.full_like(query, torch.nan)
    layer.forward(query, key, value, step, request_blocks, output)
    return output.split(counts)


def test_a_mixed_batch_gives_what_each_request_gives_alone():
    settings = LolaSettings(**SMALL)
    first, second = make_tokens(130, seed=1), make_tokens(90, seed=2)
    alone = []
    for tokens in (first, second):
        output = run_step(make_layer(settings), [(tokens, 0, len(tokens.key))], torch.tensor([[2]], dtype=torch.int32))
        alone.append(output[0])
    layer, blocks = make_layer(settings), torch.tensor([[3], [0]], dtype=torch.int32)
    outputs = [run_step(layer, [(first, 0, 100)], blocks)[0]]
    for i in range(30):
        one, other = run_step(layer, [(first, 100 + i, 101 + i), (second, 3 * i, 3 * i + 3)], blocks)
        outputs.append(one)
        # Float32 sums in another order.
        assert torch.allclose(other, alone[1][3 * i : 3 * i + 3], atol=1e-4)
    assert torch.allclose(torch.cat(outputs), alone[0], atol=1e-4)


def test_a_prompt_whose_only_token_comes_as_a_decode():
    layer, tokens = make_layer(LolaSettings(**SMALL)), make_tokens(1)
    output = run_step(layer, [(tokens, 0, 1)], torch.zeros(1, 1, dtype=torch.int32))
    assert torch.allclose(output[0][0], tokens.value[0].repeat_interleave(GROUP, 0), atol=1e-6)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_feature_maps_from_a_file(tmp_path, per_query_head):
    maps = make_maps(per_query_head=per_query_head)
    path = tmp_path / "maps.safetensors"
    tensors = {"query_map": maps.query, "key_map": maps.key, "bias": maps.bias, "kappa": maps.kappa}
    save_file({f"layers.0.{name}": tensor for name, tensor in tensors.items()}, path)
    settings = LolaSettings(**SMALL, state="hedgehog", feature_maps=str(path))
    layer = make_layer(settings)
    assert layer.memory.heads == (HEADS if per_query_head else KV_HEADS)
    tokens = make_tokens(200)
    output = run_step(layer, [(tokens, 0, 200)], torch.tensor([[1]], dtype=torch.int32))[0]
    assert output.isfinite().all()
    nothing = run_step(make_layer(LolaSettings(**SMALL, state="none")), [(tokens, 0, 200)], torch.tensor([[1]]))[0]
    assert torch.allclose(output[:32], nothing[:32], atol=1e-5)  # everything is in the window
    assert not torch.allclose(output[150:], nothing[150:], atol=1e-2)


def test_directions_from_a_file(tmp_path):
    path = tmp_path / "directions.safetensors"
    directions = torch.linalg.qr(torch.randn(KV_HEADS, HEAD_SIZE, 4, generator=torch.Generator().manual_seed(3)))
    directions = directions.Q.mT.contiguous()
    save_file({"layers.0.query_directions": directions, "layers.0.key_directions": directions.clone()}, path)
    layer = make_layer(LolaSettings(**SMALL, directions=str(path)))
    assert torch.equal(layer.rules.state.directions.key, directions)


def test_bytes_per_request_of_an_8b_model():
    assert memory(LolaSettings(), 128, torch.bfloat16) * 8 * 32 == 263104 * 256  # 67.4 MB


def test_rank_over_the_head_size_is_refused():
    with pytest.raises(ConfigError, match=r"^lola.state_rank is 68, but must be at most the model's head size, 64\.$"):
        memory(LolaSettings(state_rank=68), 64, torch.bfloat16)
