"""Settings of a method: dataclass fields with rules, checked when they are made."""

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, ClassVar, Self


class ConfigError(ValueError):
    """A setting that cannot be served; the message is one sentence with key, value and remedy."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of a method's settings, given to vLLM as `additional_config={key: {...}}`.

    A subclass is a frozen dataclass; the metadata of a field holds its rules: `choices`, `minimum`, `above`,
    `maximum`, `multiple_of`.

    Raises:
        ConfigError: a value has the wrong type or lies outside what is allowed.
    """

    key: ClassVar[str]
    """Of these settings in `additional_config`: the method's name in lower case."""

    capture: str | None = None
    """Folder for the queries, keys and values of every layer (see `core/capture.py`); null: nothing is written."""
    capture_tokens: int = field(default=65536, metadata={"minimum": 1})
    """Tokens, of all requests together, after which nothing more is captured."""

    def __post_init__(self) -> None:
        for item in fields(self):
            _check_field(f"{self.key}.{item.name}", getattr(self, item.name), item.type, item.metadata)

    def changed(self) -> dict[str, Any]:
        """The values that are not the defaults, as `from_dict` takes them."""
        values = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """The settings from their entry of vLLM's `additional_config`.

        Raises:
            ConfigError: `values` is no dictionary, has an unknown key, or a value is not allowed.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.key} is {values!r}, but must be a dictionary of settings.")
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}."
                raise ConfigError(f"{cls.key}.{key} is not a setting of vllm-lrqk; {hint}")
        return cls(**values)


_TYPE_NAMES: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
    bool | str: ((bool, str), 'true, false or "auto"'),
    int | None: ((int, type(None)), "a whole number or null"),
    float | None: ((int, float, type(None)), "a number or null"),
    str | None: ((str, type(None)), "a string or null"),
}


def _check_field(name: str, value: Any, declared: Any, rule: Any) -> None:
    types, wording = _TYPE_NAMES[declared]
    is_wrong_bool = isinstance(value, bool) and bool not in types
    if not isinstance(value, types) or is_wrong_bool:
        raise ConfigError(f"{name} is {value!r}, but must be {wording}.")
    if value is None:
        return
    if value == "":
        raise ConfigError(f"{name} is '', but must be null or not empty.")
    if isinstance(value, float) and not isfinite(value):
        raise ConfigError(f"{name} is {value}, but must be finite.")
    if "choices" in rule and value not in rule["choices"]:
        allowed = ", ".join(str(choice) for choice in rule["choices"])
        raise ConfigError(f"{name} is {value!r}, but must be one of {allowed}.")
    if "minimum" in rule and value < rule["minimum"]:
        raise ConfigError(f"{name} is {value}, but must be {rule['minimum']} or more.")
    if "above" in rule and not value > rule["above"]:
        raise ConfigError(f"{name} is {value}, but must be above {rule['above']:g}.")
    if "maximum" in rule and value > rule["maximum"]:
        raise ConfigError(f"{name} is {value}, but must be {rule['maximum']:g} or less.")
    if "multiple_of" in rule and value % rule["multiple_of"]:
        raise ConfigError(f"{name} is {value}, but must be a multiple of {rule['multiple_of']}.")
