"""`vllm-lrqk calibrate`: what it refuses before an engine starts, and what a real engine's layers give."""

import json
import re
import sys

import pytest
import torch
from engines import MIB, tiny_llama
from safetensors import safe_open

from vllm_lrqk import command_line
from vllm_lrqk.calibration.command import calibrate, main
from vllm_lrqk.calibration.texts import standard_library, windows
from vllm_lrqk.core.calibration import CalibrationFile, ModelIdentity
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.rotary import RotaryTable

ENGINE = {"dtype": "float32", "kv_cache_memory_bytes": 16 * MIB, "skip_tokenizer_init": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0, but must be 1 or more."),
        (["--page-size", "8"], "--page-size is 8, but must be 16 or more."),
        (["--window", "1"], "--window is 1, but must be 2 or more."),
        (["--window", "9999999"], "--window is 9999999, but must be below the model's context of "),
        (["--text", "nowhere.txt"], "--text has 'nowhere.txt', which cannot be read"),
        (["--text", __file__], "--tokens is 16384, but the texts have "),
        (["--engine", '{"pipeline_parallel_size": 2}'], "--engine has pipeline_parallel_size 2, but calibration needs"),
    ],
)
def test_refusals(arguments, message, needle_folder, tmp_path):
    output = tmp_path / "file"
    with pytest.raises(SystemExit, match=re.escape(f"vllm-lrqk calibrate: {message}")):
        main([str(needle_folder), "--output", str(output), *arguments])
    assert not output.exists()


def test_a_file_in_the_models_folder_is_refused(needle_folder):
    """vLLM would load it as weights."""
    output = needle_folder / "calibration.safetensors"
    with pytest.raises(
        SystemExit, match=r"--output is .*calibration\.safetensors, but vLLM loads every .* elsewhere\.$"
    ):
        main([str(needle_folder), "--output", str(output)])
    assert not output.exists()


def test_the_console_script_knows_its_commands(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vllm-lrqk", "calibrate", "nowhere/at-all", "--output", "file"])
    with pytest.raises(SystemExit, match="vllm-lrqk calibrate: MODEL 'nowhere/at-all' cannot be loaded"):
        command_line.main()
    monkeypatch.setattr(sys, "argv", ["vllm-lrqk", "serve"])
    with pytest.raises(SystemExit, match="usage: vllm-lrqk plan"):
        command_line.main()


def test_windows_use_as_many_tokens_as_asked_for():
    cut = windows(["abcdefgh", "ijklmnop", "never read"], lambda text: [ord(c) for c in text], 10, 4)
    assert "".join(chr(token) for window in cut for token in window) == "abcdefghij"
    assert [len(window) for window in cut] == [4, 4, 2]
    with pytest.raises(ConfigError, match="--tokens is 9, but the texts have 3: lower it"):
        windows(["abc"], lambda text: list(text.encode()), 9, 4)


def test_the_standard_library_is_read_in_one_order():
    first, second = standard_library(), standard_library()
    assert first == second and len(first) > 100


@pytest.mark.engine
def test_an_engine_gives_the_moments_of_its_layers_every_time(models, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(models)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 512, (count,), generator=generator).tolist() for count in (100, 63)]
    found = [calibrate(str(folder), prompts, 128, 32, ENGINE) for _ in range(2)]
    layers, frames = found[0].layers, found[0].frames
    assert found[0].refused == [] and frames is not None and frames.cos.shape == (65536 // 32, 32)
    torch.testing.assert_close(frames.cos[5], RotaryTable.from_base(1e4, 64, 256).cos[160], atol=1e-5, rtol=0)
    assert list(layers) == [0, 1]
    for name in layers:
        for ours, theirs in zip(vars(layers[name]).values(), vars(found[1].layers[name]).values()):
            assert torch.equal(ours, theirs)

    # The same model in transformers: keys after RoPE, of the first layer, in both frames.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    keys, framed = torch.zeros(2, 64, 64).double(), torch.zeros(2, 64, 64).double()
    for ids in prompts:
        cache = model(torch.tensor([ids]), use_cache=True).past_key_values
        key = cache.layers[0].keys[0].double()  # [KV, T, d]
        keys += key.mT @ key
        angle = (torch.arange(len(ids)) // 32 * 32)[:, None] * 1e4 ** (-torch.arange(0, 64, 2).double() / 64)
        first, second = key.chunk(2, -1)
        back = torch.cat([first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()], -1)
        framed += back.mT @ back
    first_layer = layers[0]
    torch.testing.assert_close(first_layer.key.double(), keys.detach() / 163, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(first_layer.page_key.double(), framed.detach() / 163, atol=1e-3, rtol=1e-3)


@pytest.mark.engine
def test_the_command_writes_a_file_that_its_model_accepts(needle_folder, tmp_path, capsys):
    output = tmp_path / "needle.safetensors"
    arguments = ["--output", str(output), "--tokens", "600", "--window", "256", "--dtype", "float32"]
    main([str(needle_folder), *arguments])
    assert re.search(r"\d+ layers, 600 tokens", capsys.readouterr().out)
    with safe_open(output, "pt") as file:
        assert file.metadata()["tokens"] == "600"
        identity = file.metadata()["identity"]
    file = CalibrationFile("aqua.calibration", str(output), ModelIdentity(**json.loads(identity)))
    assert file.page_size == 256
