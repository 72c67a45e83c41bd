"""What has been measured, in a folder that a later run goes on with."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation.errors import EvaluationError

Key = tuple[str, str, int, int, int]


@dataclass(frozen=True)
class Record:
    """One sample under one configuration."""

    configuration: str
    task: str
    length: int
    """Tokens asked for."""
    seed: int
    turn: int
    """0 where a text has one question."""
    score: float
    """0 to 1; of a perplexity the mean of -log p per token, in nats."""
    output: str
    prompt_tokens: int
    device_bytes_per_token: float
    device_bytes_per_request: float = 0.0
    """Beside those of its tokens."""
    divergence: float | None = None
    """Of a perplexity: mean Kullback-Leibler divergence from dense attention per token, in nats."""
    steps: float | None = None
    """Decode steps times layers and KV heads, over which `rows_attended` is a sum. None for dense attention.

    The counts of requests that ran together are shared out equally, so only sums over records mean something.
    """
    rows_attended: float | None = None
    rows_hit: float | None = None
    rows_missed: float | None = None

    @property
    def key(self) -> Key:
        return self.configuration, self.task, self.length, self.seed, self.turn


class Store:
    """`settings.json` and the records of a folder, `records.jsonl`, one per line."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Open or create. Raises EvaluationError, by name, if the folder was filled with other settings.

        `settings["configurations"]` and `settings["files"]` may grow; what they had must be the same.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "records.jsonl"
        path = folder / "settings.json"
        if path.exists():
            settings = _merge(json.loads(path.read_text()), settings, folder)
        path.write_text(json.dumps(settings, indent=1))
        self.records: dict[Key, Record] = {}
        if self._file.exists():
            whole = [line for line in self._file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self._file.write_text("".join(whole))  # a run that was killed may have left half a line
            for line in whole:
                record = Record(**json.loads(line))
                self.records[record.key] = record

    def add(self, records: list[Record]) -> None:
        """Append, so that they survive whatever comes next."""
        with self._file.open("a") as file:
            file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        self.records |= {record.key: record for record in records}


def _merge(old: dict[str, Any], new: dict[str, Any], folder: Path) -> dict[str, Any]:
    merged = dict(new)
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            for key, item in value.items():
                if key in old[name] and old[name][key] != item:
                    _refuse(f"{name}.{key}", old[name][key], item, folder)
            merged[name] = old[name] | value
        elif old.get(name) != value:
            _refuse(name, old.get(name), value, folder)
    return merged


def _refuse(name: str, old: Any, new: Any, folder: Path) -> None:
    raise EvaluationError(
        f"{name} is {json.dumps(new)}, but the records in {folder} were made with {json.dumps(old)}: "
        "use the same again or another --output."
    )


def fingerprint(path: Path) -> str:
    """Identifies a file, or the configuration, tokenizer and weights of a model's folder.

    Of files above 1 MiB the size and both ends count.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    edge = 1 << 19
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(edge))
            content.seek(max(edge, size - edge))
            digest.update(content.read(edge))
    return digest.hexdigest()[:16]
