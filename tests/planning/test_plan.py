"""What `vllm-lrqk plan` reads from config.json is what vLLM's own planner and the start-up line find."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from startup import start

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.integration.startup import start_line
from vllm_lrqk.planning.command import main
from vllm_lrqk.planning.deployment import Deployment
from vllm_lrqk.planning.model import read_model
from vllm_lrqk.planning.plan import Plan, even_stages, make_plans

GIB = 1 << 30
FULL, SLIDING = "full_attention", "sliding_attention"
LENGTH, REQUESTS = 2048, 8
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 256,
    "vocab_size": 64,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "grouped": LLAMA | {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 64},
    "multi-head": LLAMA | {"num_hidden_layers": 2},
    "one KV head": LLAMA | {"num_hidden_layers": 5, "num_key_value_heads": 1, "head_dim": 128, "dtype": "float16"},
    "odd head": LLAMA | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 80},
    "qwen": LLAMA
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2}
    | {"num_key_value_heads": 2, "head_dim": 96, "dtype": "float32"},
    "old names": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 3,
        "n_head": 4,
        "n_embd": 256,
        "n_positions": 4096,
        "vocab_size": 64,
        "dtype": "bfloat16",
    },
}


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODELS[request.param]))
    return tmp_path


def plans(
    folder: Path, device: str, device_gib: float | None, settings: dict[str, Any], step_tokens: int | None = None
) -> dict[str, Plan]:
    deployment = Deployment(device, device_gib, 0.25, LENGTH, REQUESTS, 1, 1, 1e12, 1e10, step_tokens)
    return {plan.method: plan for plan in make_plans(read_model(str(folder)), deployment, settings)}


def figures(line: str) -> list[int]:
    """Of a start-up line of a method with pages: bytes, then tokens."""
    return [int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", line.partition("kernels):")[2])]


def vllm_blocks(config: Any, specs: dict[str, Any], memory: int) -> int:
    """Blocks that vLLM's planner makes of so much memory."""
    from vllm.v1.core import kv_cache_utils as planner

    config.cache_config.kv_cache_layout = "BLHNC"
    if hasattr(planner, "get_kv_cache_configs"):
        return planner.get_kv_cache_configs(config, [specs], [memory])[0].num_blocks
    from vllm.v1.core import kv_cache_planning  # from 0.33 on

    groups = kv_cache_planning.get_kv_cache_groups(config, specs)
    return kv_cache_planning.get_kv_cache_configs(config, [specs], [memory], groups)[0].num_blocks


def layer_specs(config: Any, layers: int, kv_heads: int, head_size: int) -> dict[str, Any]:
    """What the layers tell vLLM."""
    from vllm_lrqk.integration.blocks import page_spec, request_spec
    from vllm_lrqk.integration.window_blocks import window_spec

    engine = config.additional_config.engine
    plan, shape = engine.plan(config), (kv_heads, head_size, engine.num_host_pages)
    specs: dict[str, Any] = {}
    windows, kinds = engine.windows, getattr(config.model_config.hf_text_config, "layer_types", None) or ()
    for layer in range(layers):
        if windows is not None and kinds[layer] == SLIDING:
            beside = windows.plan.block_size, kv_heads, head_size, config.model_config.dtype, windows.blocks
            specs[f"layers.{layer}"] = window_spec(windows.plan.window, *beside)
            continue
        if plan.is_paged:
            specs[f"layers.{layer}"] = page_spec(plan, *shape)
        if plan.blocks_per_request:
            specs[f"layers.{layer}.requests"] = request_spec(plan, *shape)
    return specs


def engine_line(folder: Path, method: str, settings: dict[str, Any], memory: int | None, **more: Any) -> str:
    """The start-up line of an engine, with vLLM's own planner, without loading anything."""
    model = read_model(str(folder))
    additional = {method.lower(): settings}
    config = start(
        folder,
        attention_backend=method,
        additional_config=additional,
        max_num_seqs=REQUESTS,
        dtype="auto",
        kv_cache_memory_bytes=memory,
        **more,
    )
    assert config.model_config.dtype == model.dtype
    kv_heads = config.model_config.get_num_kv_heads(config.parallel_config)
    specs = layer_specs(config, len(model.kv_heads), kv_heads, config.model_config.get_head_size())
    return start_line(config, "torch", vllm_blocks(config, specs, config.cache_config.kv_cache_memory_bytes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_lrqk(folder: Path, device: str) -> None:
    """On the CPU platform a hot cache that is asked for makes the plan of a GPU."""
    settings = {"host_memory_gib": 0.25, "top_k": 128, "page_size": 64, "rank": 8}
    memory = None if device == "cpu" else GIB // 16
    line = engine_line(folder, "LRQK", settings | {"hot_cache": device == "cuda"}, memory)
    device_bytes, host_bytes, tokens, host_tokens, device_tokens, dense = figures(line)
    plan = plans(folder, device, None if memory is None else memory / GIB, {"lrqk": settings})["LRQK"].as_dict()
    assert plan["device_bytes_per_token"] == device_bytes
    assert plan["host_bytes_per_token"] == host_bytes
    assert plan["tokens"] == tokens
    assert plan["device_tokens"] == device_tokens
    assert plan["dense_tokens_in_device_memory"] == dense
    assert min(plan["host_tokens"], device_tokens) == min(host_tokens, device_tokens)


WINDOWS: dict[str, dict[str, Any]] = {
    "gemma3": LLAMA
    | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 7}
    | {"num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 48}
    | {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING]},
    "gpt-oss": LLAMA
    | {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 4}
    | {"num_key_value_heads": 4, "head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    | {"rope_scaling": None, "sliding_window": 300, "layer_types": [SLIDING, FULL] * 2, "dtype": "float32"},
}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("hot_cache", [False, True])
@pytest.mark.parametrize("memory", [None, GIB // 8, GIB // 64])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(tmp_path: Path, name: str, memory: int | None, hot_cache: bool) -> None:
    """Full layers by the method, windows a constant per request; with pools that the user sized, or did not."""
    (tmp_path / "config.json").write_text(json.dumps(WINDOWS[name]))
    settings = {"host_memory_gib": 0.25, "top_k": 128, "page_size": 64, "rank": 8, "hot_cache": hot_cache}
    line = engine_line(tmp_path, "LRQK", settings, memory, max_num_batched_tokens=128)
    device_bytes, host_bytes, tokens, host_tokens, device_tokens, dense = figures(line)
    found = plans(tmp_path, "cpu", None if memory is None else memory / GIB, {"lrqk": settings}, 128)
    plan = found["LRQK"].as_dict()
    assert plan["refused"] is None
    assert (plan["device_bytes_per_token"], plan["host_bytes_per_token"]) == (device_bytes, host_bytes)
    for own, engines in (("tokens", tokens), ("host_tokens", host_tokens), ("device_tokens", device_tokens)):
        assert plan[own] == pytest.approx(engines, rel=0.01), own
    assert plan["dense_tokens_in_device_memory"] == pytest.approx(dense, rel=0.01)
    windows = config_of(tmp_path)["layer_types"].count(SLIDING)
    row = found["LRQK"].capacity.dense_bytes_per_head * config_of(tmp_path)["num_key_value_heads"]
    assert plan["window_bytes_per_request"] >= windows * config_of(tmp_path)["sliding_window"] * row
    assert "--max-num-batched-tokens 128" in str(plan["command"])
    assert all("sliding-window layers" in str(found[method].refused) for method in ("LOLA", "AQUA"))


@pytest.mark.parametrize(("name", "heads", "windows"), [("gemma3", 4, 3 * (3 + 1)), ("gpt-oss", 8, 19 + 1)])
def test_windows_of_dense_requests(tmp_path: Path, name: str, heads: int, windows: int) -> None:
    """A request takes a page of the full layers for every 16 tokens, and a window of blocks as large for each group."""
    (tmp_path / "config.json").write_text(json.dumps(WINDOWS[name]))
    room = plans(tmp_path, "cpu", None, {})["dense"].capacity
    assert room.blocks_of(LENGTH) == (LENGTH // 16, windows)
    assert room.block_bytes == heads * 16 * 2 * 64 * read_model(str(tmp_path)).dtype.itemsize


def test_windows_limit_the_requests(tmp_path: Path) -> None:
    """Where a quarter of the memory holds fewer windows than requests may run."""
    (tmp_path / "config.json").write_text(json.dumps(WINDOWS["gpt-oss"] | {"sliding_window": 1000}))
    deployment = Deployment("cpu", None, 0.125, 64, 64, 1, 1, 1e12, 1e10, 64)
    plan = make_plans(read_model(str(tmp_path)), deployment, {"lrqk": {"page_size": 64}})[-1]
    assert plan.method == "LRQK"
    assert plan.capacity.limit(64) == "windows"
    assert 1 < plan.requests < 64


def test_windows_on_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(WINDOWS["gemma3"]))
    plan = plans(tmp_path, "cuda", 1, {})["LRQK"]
    assert plan.command is None
    assert re.fullmatch(
        r"LRQK serves sliding-window layers on the CPU platform only, and .* another .*\.", plan.refused
    )


def test_lola(folder: Path) -> None:
    line = engine_line(folder, "LOLA", {"window": 64}, GIB // 16)
    plan = plans(folder, "cuda", 1 / 16, {"lola": {"window": 64}})["LOLA"]
    mib, requests = re.findall(r"[\d,.]*\d", line.partition("kernels):")[2])
    assert f"{plan.capacity.device_bytes_per_request / 2**20:,.1f}" == mib
    assert plan.capacity.tokens(LENGTH) == int(requests.replace(",", "")) * LENGTH


def test_a_method_without_a_host_tier_takes_what_it_is_given(folder: Path) -> None:
    plan = plans(folder, "cpu", 1 / 16, {"aqua": {"key_dtype": "int8"}})["AQUA"]
    assert plan.refused is not None
    assert "aqua.calibration" in plan.refused
    room = plan.capacity
    assert room.num_blocks == GIB // 16 // room.block_bytes
    assert room.host_bytes_per_token == 0


def write(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 4} | config))
    return str(folder)


def test_layers_with_different_heads(tmp_path: Path) -> None:
    blocks = [{"attention": {"no_op": False, "n_heads_in_group": group}} for group in (4, 2, 8)]
    blocks.append({"attention": {"no_op": True, "n_heads_in_group": None}})
    model = read_model(write(tmp_path, block_configs=blocks))
    assert model.kv_heads == (2, 4, 1, 0)
    plan = {plan.method: plan for plan in make_plans(model, Deployment("cuda", 1, 1, 1024, 1, 1, 1, 1, 1), {})}["LRQK"]
    assert plan.capacity.heads == 7


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7])
def test_stages_are_vllms(stages: int) -> None:
    from vllm.distributed.utils import get_pp_indices

    for layers in range(stages, 33):
        assert even_stages(layers, stages) == [get_pp_indices(layers, stage, stages) for stage in range(stages)]


def test_ranks_share_the_host_and_the_heads(tmp_path: Path) -> None:
    model = read_model(write(tmp_path, num_key_value_heads=4, head_dim=64))

    def lrqk(tensor: int, pipeline: int) -> Plan:
        deployment = Deployment("cuda", 0.25, 1, LENGTH, 64, tensor, pipeline, 1e12, 1e10)
        return next(plan for plan in make_plans(model, deployment, {}) if plan.method == "LRQK")

    alone, tensor, both = lrqk(1, 1), lrqk(2, 1), lrqk(2, 2)
    assert [plan.capacity.heads for plan in (alone, tensor, both)] == [16, 8, 4]
    assert alone.capacity.host_pages == tensor.capacity.host_pages == both.capacity.host_pages
    assert "--tensor-parallel-size 2 --pipeline-parallel-size 2" in str(both.command)


BAD = [
    (["--device-memory", "0"], "--device-memory is 0"),
    ([], "--device-memory is missing"),
    (["--device-memory", "1", "--host-memory", "-1"], "--host-memory is -1"),
    (["--device-memory", "1", "--max-model-len", "0"], "--max-model-len is 0"),
    (["--device-memory", "1", "--max-num-seqs", "0"], "--max-num-seqs is 0"),
    (["--device-memory", "1", "--tensor-parallel-size", "3"], "--tensor-parallel-size is 3"),
    (["--device-memory", "1", "--max-num-batched-tokens", "8"], "--max-num-batched-tokens is 8"),
    (["--device-memory", "1", "--pipeline-parallel-size", "9"], "--pipeline-parallel-size is 9"),
    (["--device-memory", "1", "--dtype", "int3"], "--dtype is 'int3'"),
    (["--device-memory", "1", "--additional-config", '{"LRQK": {}}'], "'LRQK'"),
    (["--device-memory", "1", "--additional-config", '{"lrqk": {"rnak": 8}}'], "lrqk.rnak"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as error:
        main([write(tmp_path), *arguments])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kv_lora_rank": 64}, "latent attention"),
        ({"num_hidden_layers": 0}, "no attention heads or layers"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"sliding_window": 64, "layer_types": [SLIDING] * 4}, "sliding window of 64 tokens in every layer"),
        ({"sliding_window": 64}, "sliding window of 64 tokens in every layer"),
        ({"layer_types": [FULL, "linear_attention"] * 2}, "'linear_attention'"),
        ({"attention_chunk_size": 64}, "chunked local attention"),
    ],
)
def test_models_that_are_not_planned_for(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(write(tmp_path, **config))


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_model(str(tmp_path))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model("no-such-owner/no-such-model")


def test_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, picture = write(tmp_path), tmp_path / "plan.png"
    arguments = [name, "--device-memory", "0.01", "--host-memory", "1", "--max-num-seqs", "500"]
    main([*arguments, "--plot", str(picture)])
    text = capsys.readouterr().out
    assert all(word in text for word in ("dense", "LRQK", "LOLA", "AQUA runs on the CPU only", "vllm serve"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    main([*arguments, "--json"])
    found = {plan["method"]: plan for plan in json.loads(capsys.readouterr().out)}
    assert found["LRQK"]["limit"] == "device memory"
    assert found["LRQK"]["requests"] >= found["dense"]["requests"]
    row = 2 * 32 * torch.bfloat16.itemsize
    assert found["dense"]["step_seconds_estimate"] == pytest.approx(4 * 8 * 4096 * row / 3350e9)
