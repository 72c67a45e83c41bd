"""The settings of LoLA, and how many tokens each part of a request's memory holds."""

from dataclasses import dataclass, field
from typing import ClassVar

from vllm_lrqk.core.config import ConfigError, Settings


@dataclass(frozen=True, kw_only=True)
class LolaSettings(Settings):
    """Settings of LoLA attention, given to vLLM as `additional_config={"lola": {...}}`.

    Raises:
        ConfigError: a value has the wrong type or lies outside what is allowed.
    """

    key: ClassVar[str] = "lola"

    window: int = field(default=192, metadata={"minimum": 16, "multiple_of": 16})
    """Latest tokens that are attended exactly, at least (the current one included)."""
    chunk: int = field(default=64, metadata={"minimum": 16, "multiple_of": 16})
    """Tokens that leave the window together; the window holds up to `window + chunk`."""
    cache: int = field(default=236, metadata={"minimum": 0})
    """Older tokens per KV head that stay exact: those which the state recalls worst."""
    sink_tokens: int = field(default=4, metadata={"minimum": 0})
    """First tokens that never leave the cache."""
    state: str = field(default="slope", metadata={"choices": ("slope", "hedgehog", "none")})
    """What stands for all other tokens. "slope": their number, mean key and value, and the slope of the values along
    `state_rank` directions of the keys; "hedgehog": linear attention with learned feature maps; "none": nothing."""
    state_rank: int = field(default=16, metadata={"minimum": 4, "multiple_of": 4})
    """Directions of `state: "slope"`; a multiple of 4, at most the model's head size."""
    directions: str | None = None
    """Calibration file of the model (`vllm-lrqk calibrate`) that they come from; null: the slowest of RoPE."""
    select: str = field(default="recall", metadata={"choices": ("recall", "random")})
    """Who stays in the cache. "recall": the largest self-recall error; "random": a control for measurements."""
    feature_maps: str | None = None
    """File with the feature maps of `state: "hedgehog"` (see `feature_maps.py`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_tokens > self.cache:
            raise ConfigError(
                f"lola.cache is {self.cache}, but must hold the {self.sink_tokens} sink_tokens: "
                f"set it to {self.sink_tokens} or more, or sink_tokens to {self.cache}."
            )
        if self.state == "hedgehog" and self.feature_maps is None:
            raise ConfigError(
                'lola.feature_maps is null, but lola.state is "hedgehog": name the file of the feature maps, '
                'or set state to "slope".'
            )
        if self.state != "hedgehog" and self.feature_maps is not None:
            raise ConfigError(
                f"lola.feature_maps is {self.feature_maps!r}, but lola.state is {self.state!r}: "
                'set state to "hedgehog", or feature_maps to null.'
            )
        if self.state != "slope" and self.directions is not None:
            raise ConfigError(
                f"lola.directions is {self.directions!r}, but lola.state is {self.state!r}: "
                'set state to "slope", or directions to null.'
            )

    @property
    def ring_rows(self) -> int:
        """Rows of the window's ring; the token at position p lies in row p % ring_rows."""
        return self.window + self.chunk

    def updates(self, seen: int) -> int:
        """Chunks that have left the window when `seen` tokens, the current one included, were taken in.

        The oldest chunk leaves when the ring is full and another token comes: chunk u is tokens
        u * chunk ... (u + 1) * chunk - 1 of the request, however the prompt was cut.
        """
        return max(0, -(-(seen - self.ring_rows) // self.chunk))

    def cached(self, updates: int) -> int:
        """Rows of the cache after so many updates."""
        return min(self.cache, updates * self.chunk)

    def folded(self, updates: int) -> int:
        """Tokens in the state after so many updates."""
        return updates * self.chunk - self.cached(updates)
