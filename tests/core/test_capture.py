"""What a real engine captures: the layer's own attention can be computed from it."""

import json

import pytest
import torch
from engines import engine, greedy, tiny_llama, token_prompts
from startup import start

from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.step import build_step
from vllm_lrqk.evaluation.attention.captures import CaptureError, read_capture
from vllm_lrqk.evaluation.attention.decoding import dense_decode
from vllm_lrqk.evaluation.attention.sources import captured_sequences
from vllm_lrqk.integration.checks import check_model
from vllm_lrqk.integration.settings import make_method

TOKENS = 12
SHAPE = LayerShape(4, 2, 8, "float32", 8**-0.5)


@pytest.fixture(scope="module")
def served(models, tmp_path_factory):
    """A folder with three requests, one alone and two at once, and the first one's outputs by layer, in order."""
    from vllm_lrqk.integration.impl import LRQKImpl

    folder = tmp_path_factory.mktemp("capture") / "new"
    outputs: dict[str, list[torch.Tensor]] = {}
    forward = LRQKImpl.forward

    def record(self, layer, query, key, value, kv_cache, attn_metadata, output, **others):
        result = forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **others)
        if attn_metadata is not None:
            outputs.setdefault(layer.layer_name, []).append(output[: attn_metadata.num_tokens].clone())
        return result

    settings = {"page_size": 64, "capture": str(folder), "capture_tokens": 600}
    batch = {"max_num_batched_tokens": 128, "enable_prefix_caching": False}
    with pytest.MonkeyPatch.context() as patch, engine(tiny_llama(models, 4, 2, 64), settings, **batch) as llm:
        patch.setattr(LRQKImpl, "forward", record)
        prompts = token_prompts([200, 70])
        greedy(llm, prompts[:1], TOKENS)
        alone = {name: torch.cat(parts) for name, parts in outputs.items()}
        greedy(llm, prompts, TOKENS)
        greedy(llm, token_prompts([400], seed=1), TOKENS)
    return folder, alone


@pytest.mark.engine
def test_dense_attention_of_the_capture_is_the_layers_output(served):
    """top_k covers everything, so that the layer is dense. Tolerance: float32 sums in another order."""
    folder, outputs = served
    layers = [layer for layer in read_capture(folder) if layer.request == "request-0000"]
    assert [layer.layer for layer in layers] == sorted(outputs)
    for layer, qkv in zip(layers, captured_sequences(folder)):
        assert (layer.prompt_tokens, len(layer.query)) == (200, 200 + TOKENS - 1)
        dense = dense_decode(qkv, TOKENS - 1)
        torch.testing.assert_close(outputs[layer.layer][200:].view_as(dense), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.engine
def test_requests_at_once_are_kept_apart(served):
    """The same prompt captured alone and beside another one. Tolerance: matrix products of other sizes."""
    layers = {(layer.request, layer.layer): layer for layer in read_capture(served[0])}
    for (request, name), layer in layers.items():
        if request == "request-0001":
            alone = layers["request-0000", name]
            torch.testing.assert_close(layer.query, alone.query, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(layer.value, alone.value, rtol=1e-3, atol=1e-4)


@pytest.mark.engine
def test_the_limit_ends_the_capture(served):
    """211 + 211 + 81 tokens leave 97 of 600: the last request's first chunk has 128, and no later step is written."""
    lengths = {(layer.request, len(layer.query)) for layer in read_capture(served[0])}
    assert lengths == {("request-0000", 211), ("request-0001", 211), ("request-0002", 81)}


def capture_of(folder, tokens=5, layers=("a", "b"), limit=100):
    """A request of `tokens` prompt tokens and one decoded, whose numbers count up."""
    for name in layers:
        capture = LayerCapture(folder, name, SHAPE, limit)
        for first, count in ((0, tokens), (tokens, 1)):
            step = build_step(
                [0, count],
                [first + count],
                torch.tensor([[3]], dtype=torch.int32),
                torch.tensor([first + count], dtype=torch.int32),
                torch.arange(count),
                16,
            )
            rows = torch.arange(first, first + count).float()[:, None, None]
            capture.write(rows.expand(-1, 4, 8), rows.expand(-1, 2, 8) + 0.25, rows.expand(-1, 2, 8) + 0.5, step)


def test_what_is_written_is_read(tmp_path):
    capture_of(tmp_path)
    layers = read_capture(tmp_path)
    assert [(layer.request, layer.layer) for layer in layers] == [("request-0000", "a"), ("request-0000", "b")]
    layer = layers[0]
    assert layer.prompt_tokens == 5
    assert layer.query[:, 3, 7].tolist() == [0, 1, 2, 3, 4, 5]
    assert layer.key[:, 1, 0].tolist() == [0.25, 1.25, 2.25, 3.25, 4.25, 5.25]
    assert layer.value[:, 0, 0].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


def test_another_scale_is_folded_into_the_queries(tmp_path):
    capture_of(tmp_path, layers=("a",))
    header = tmp_path / "request-0000" / "a.json"
    header.write_text(json.dumps(json.loads(header.read_text()) | {"scale": 2 * 8**-0.5}))
    assert captured_sequences(tmp_path)[0].query[:, 0, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_nothing_to_read(tmp_path):
    with pytest.raises(CaptureError, match=r"has no captured requests: set lrqk\.capture .*\.$"):
        read_capture(tmp_path)


def test_missing_bytes_are_noticed(tmp_path):
    capture_of(tmp_path)
    rows = tmp_path / "request-0000" / "b.rows"
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(CaptureError, match=r"b\.rows has 1532 bytes, but 6 tokens need 1536: capture again\.$"):
        read_capture(tmp_path)


def test_a_header_alone_is_noticed(tmp_path):
    capture_of(tmp_path)
    (tmp_path / "request-0000" / "b.rows").unlink()
    with pytest.raises(CaptureError, match=r"b\.json has no tokens beside it: capture again\.$"):
        read_capture(tmp_path)


def test_missing_steps_are_noticed(tmp_path):
    capture_of(tmp_path)
    (tmp_path / "request-0000" / "a.steps").write_text("prefill 64 5\n")
    with pytest.raises(CaptureError, match="--no-enable-prefix-caching"):
        read_capture(tmp_path)


def test_layers_that_disagree_are_noticed(tmp_path):
    capture_of(tmp_path, 5, ("a",))
    capture_of(tmp_path, 7, ("b",))
    with pytest.raises(CaptureError, match="is incomplete, a has 6 tokens and b 8"):
        read_capture(tmp_path)


def test_a_step_beyond_the_limit_is_not_written(tmp_path):
    capture_of(tmp_path, 5, limit=5)
    assert [len(layer.query) for layer in read_capture(tmp_path)] == [5, 5]


def test_refused_off_the_cpu(models, tmp_path):
    config = start(tiny_llama(models, 4, 2, 64), {"capture": str(tmp_path)}, enable_prefix_caching=False)
    check_model(config, make_method("LRQK", config.additional_config, config.device_config.device_type))
    config.device_config.device_type = "cuda"
    with pytest.raises(
        ConfigError, match=r"^lrqk\.capture is '.*', but only the CPU platform captures: leave it out\.$"
    ):
        check_model(config, make_method("LRQK", config.additional_config, config.device_config.device_type))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({}, "--no-enable-prefix-caching"), ({"enable_prefix_caching": False}, "captured requests already")],
)
def test_refused_at_start_up(models, tmp_path, settings, message):
    if settings:
        capture_of(tmp_path)
    with pytest.raises((ValueError, ConfigError), match=message):
        start(tiny_llama(models, 4, 2, 64), {"capture": str(tmp_path)}, **settings)
