"""The attention methods of this package, by the names that vLLM's `--attention-backend` takes."""

import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any

import vllm_lrqk.methods
from vllm_lrqk.evaluation.errors import EvaluationError

METHODS = sorted(module.name.upper() for module in pkgutil.iter_modules(vllm_lrqk.methods.__path__) if module.ispkg)
DEFAULT_METHOD = "LRQK"


def settings_key(backend: str) -> str:
    """Key of a method's settings in vLLM's `additional_config`."""
    return backend.lower()


def check_settings(backend: str, settings: dict[str, Any]) -> None:
    """Raise EvaluationError for a method or settings that vLLM would refuse."""
    if backend not in METHODS:
        raise EvaluationError(f"backend is {backend!r}, but must be one of {', '.join(METHODS)}.")
    try:
        _settings_class(backend).from_dict(settings)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def has_host_tier(backend: str) -> bool:
    """Whether keys and values lie in host memory, for which there is a setting."""
    return "host_memory_gib" in [field.name for field in fields(_settings_class(backend))]


def _settings_class(backend: str) -> Any:
    """The dataclass of a method's settings: the one of its `settings` module."""
    module = importlib.import_module(f"{vllm_lrqk.methods.__name__}.{backend.lower()}.settings")
    own = [item for item in vars(module).values() if is_dataclass(item) and item.__module__ == module.__name__]
    (found,) = [item for item in own if hasattr(item, "from_dict")]
    return found
