"""Where sequences come from: the generator, or what an engine captured."""

from dataclasses import dataclass, replace
from pathlib import Path

from vllm_lrqk.evaluation.attention.captures import read_capture
from vllm_lrqk.evaluation.attention.generator import SETS, generate
from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.evaluation.errors import EvaluationError


@dataclass(frozen=True)
class Source:
    """Sequences that are averaged over."""

    name: str
    sequences: list[QKV]


def captured_sequences(folder: Path) -> list[QKV]:
    """One sequence per captured request and layer.

    Raises:
        CaptureError: see `read_capture`.
    """
    sequences = []
    for layer in read_capture(folder):
        factor = layer.shape.scale * layer.shape.head_size**0.5
        query = layer.query if abs(factor - 1) < 1e-6 else layer.query.float() * factor
        sequences.append(QKV(query, layer.key, layer.value, layer.prompt_tokens))
    return sequences


def load_source(name: str, steps: int) -> Source:
    """A set of the generator by its name, or a captured folder, with at least `steps` tokens to decode.

    Raises:
        EvaluationError, CaptureError: there is no such source, or it is too short.
    """
    if name in SETS:
        spec = SETS[name]
        return Source(name, [generate(replace(spec, decode_tokens=max(steps, spec.decode_tokens)))])
    folder = Path(name)
    if not folder.is_dir():
        raise EvaluationError(
            f"--source is {name!r}, but must be a set of the generator ({', '.join(SETS)}) or a captured folder."
        )
    sequences = captured_sequences(folder)
    shortest = min(qkv.decode_tokens for qkv in sequences)
    if shortest < steps:
        raise EvaluationError(
            f"--steps is {steps}, but a request in {name} has {shortest} decoded tokens: lower --steps or let the "
            "model generate more."
        )
    return Source(folder.name, sequences)
