"""The calibration file: one safetensors file with the second moments of every attention layer of a model.

    tensors    "NUMBER.NAME", float32: for each attention layer, from 0, the tensors of `Moments` by their names
               "frames.cos", "frames.sin", float32 [pages, rotary_dim / 2]: the RoPE of the first position of each page,
               as far as the model's context goes
    metadata   "format": FORMAT; "identity": the model, as JSON; "tokens", "page_size": whole numbers;
               "is_neox_style": of the frames, true or false; "refused": names of RoPE forms, a JSON list

Where the model's RoPE cannot be turned back, "refused" names its forms, and there are no frames and no moments in
them.

Both methods that use it derive their bases when they start: AQUA from "query", "key" and "key_mean", LRQK from the
moments in page frames.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.layer import LayerPlace
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.moments import Moments
from vllm_lrqk.core.rotary import RotaryTable

FORMAT = "vllm-lrqk calibration 1"
_SHAPE_FIELDS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class ModelIdentity:
    """What of a model a calibration depends on, as far as its configuration tells; fine-tuned weights are not seen."""

    name: str
    """As it was given; not compared."""
    heads: str
    """Layers, query heads, KV heads and head size, in words."""
    rope: str
    """RoPE parameters, as JSON."""
    fingerprint: str
    """Hash of the architecture's sizes."""

    @classmethod
    def of(cls, model: ModelFacts) -> "ModelIdentity":
        """From what an engine says of its model, the same on every rank."""
        layers, config = model.config.get("num_hidden_layers"), model.config
        shape = {key: config.get(key) for key in _SHAPE_FIELDS}
        return cls(
            model.name,
            f"{layers} layers of {model.heads} query and {model.kv_heads} KV heads of size {model.head_size}",
            _canonical(config.get("rope_parameters")),
            hashlib.sha256(_canonical(shape).encode()).hexdigest()[:16],
        )


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def write_calibration(
    path: Path,
    identity: ModelIdentity,
    layers: dict[int, Moments],
    tokens: int,
    page_size: int,
    frames: RotaryTable | None,
    refused: Sequence[str] = (),
) -> None:
    """Write a file in one go: what was there before is replaced when the new file is complete.

    Args:
        layers: by the number of the attention layer.
        frames: of pages; None: only moments after RoPE are written.
        refused: names of the forms of RoPE that are why there are no frames.
    """
    tensors = {}
    for layer, moments in layers.items():
        for name, tensor in vars(moments).items():
            if frames is not None or not name.startswith("page_"):
                tensors[f"{layer}.{name}"] = tensor.contiguous()
    metadata = {"format": FORMAT, "identity": json.dumps(asdict(identity))}
    metadata |= {"tokens": str(tokens), "page_size": str(page_size), "refused": json.dumps(list(refused))}
    if frames is not None:
        tensors |= {"frames.cos": frames.cos, "frames.sin": frames.sin}
        metadata["is_neox_style"] = json.dumps(frames.is_neox_style)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    partial.chmod(0o644)  # safetensors makes files for their owner alone
    partial.replace(path)


class CalibrationFile:
    """An open calibration file that fits the model that is served.

    Args:
        setting: that names the file, for messages: "aqua.calibration".
        path: its value; None where it is not set.

    Raises:
        ConfigError: there is no such file, it is damaged, or it belongs to another model.
    """

    def __init__(self, setting: str, path: str | None, identity: ModelIdentity) -> None:
        remedy = f"make one with vllm-lrqk calibrate {identity.name} --output FILE."
        if path is None:
            raise ConfigError(f"{setting} is null, but a calibration file of {identity.name} is needed: {remedy}")
        if not Path(path).is_file():
            raise ConfigError(f"{setting} is {path!r}, which is not a file: {remedy}")
        self._setting, self._path, self._remedy = setting, path, remedy
        try:
            self._file = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{setting} is {path!r}, which is truncated or damaged ({error}): {remedy}") from error
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "no calibration")
            raise ConfigError(f"{setting} is {path!r}, which holds {found!r} and not {FORMAT!r}: {remedy}")
        self.identity = ModelIdentity(**json.loads(metadata["identity"]))
        self.tokens = int(metadata["tokens"])
        """Tokens that the model was run on."""
        self.page_size = int(metadata["page_size"])
        """Tokens of the pages of page frames."""
        self.frames: RotaryTable | None = None
        """Of pages, by their number in a request; None where the model's RoPE cannot be turned back."""
        self.refused: list[str] = json.loads(metadata.get("refused", "[]"))
        """Forms of RoPE that cannot be."""
        self._names = set(self._file.keys())
        if "is_neox_style" in metadata:
            cos, sin = (self._file.get_tensor(f"frames.{part}") for part in ("cos", "sin"))
            self.frames = RotaryTable(cos, sin, json.loads(metadata["is_neox_style"]))
        self._check(identity)

    def _check(self, served: ModelIdentity) -> None:
        for what, ours, theirs in (
            ("", self.identity.heads, served.heads),
            ("RoPE parameters ", self.identity.rope, served.rope),
            ("architecture ", self.identity.fingerprint, served.fingerprint),
        ):
            if ours != theirs:
                raise ConfigError(
                    f"{self._setting} is {self._path!r}, made for {self.identity.name} with {what}{ours}, "
                    f"but {served.name} has {theirs}: {self._remedy}"
                )

    def moments(self, place: LayerPlace, kv_heads: int) -> Moments:
        """Moments of the KV heads that a rank has of a layer; those of page frames are empty if the file has none.

        Raises:
            ConfigError: the file lacks the layer.
        """
        found = {}
        for item in fields(Moments):
            name = f"{place.number}.{item.name}"
            if name in self._names:
                tensor = self._file.get_slice(name)
                # Ranks that share a KV head come to the same one.
                first = place.rank * tensor.get_shape()[0] // place.ranks
                found[item.name] = tensor[first : first + kv_heads]
            elif item.name.startswith("page_") and self.frames is None:
                found[item.name] = found["key"][:0]
            else:
                raise ConfigError(f"{self._setting} is {self._path!r}, which has nothing of {name}: {self._remedy}")
        return Moments(**found)


class CalibrationSource:
    """A calibration file that each process opens for itself: what travels is where it is.

    Args: as of `CalibrationFile`.
    """

    def __init__(self, setting: str, path: str | None, identity: ModelIdentity) -> None:
        self._arguments = setting, path, identity
        self._file: CalibrationFile | None = None

    def open(self) -> CalibrationFile:
        """The open file. Raises ConfigError if it cannot serve the model."""
        if self._file is None:
            self._file = CalibrationFile(*self._arguments)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}
