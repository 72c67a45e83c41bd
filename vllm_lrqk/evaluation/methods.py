"""The attention methods that can be compared with dense attention."""

from dataclasses import fields
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.methods import METHODS, method_class

DEFAULT_METHOD = "LRQK"


def check_settings(backend: str, settings: dict[str, Any]) -> None:
    """Raise EvaluationError for a method or settings that vLLM would refuse."""
    if backend not in METHODS:
        raise EvaluationError(f"backend is {backend!r}, but must be one of {', '.join(METHODS)}.")
    try:
        method_class(backend).settings_type.from_dict(settings)
    except ConfigError as error:
        raise EvaluationError(str(error)) from error


def settings_key(backend: str) -> str:
    """Key of a method's settings in vLLM's `additional_config`."""
    return method_class(backend).settings_type.key


def has_host_tier(backend: str) -> bool:
    """Whether keys and values lie in host memory, for which there is a setting."""
    return "host_memory_gib" in [field.name for field in fields(method_class(backend).settings_type)]
