"""The settings of AQUA."""

from dataclasses import dataclass, field
from typing import ClassVar

from vllm_lrqk.core.config import Settings

BLOCK_SIZES = (16, 32, 64, 128, 256, 512)
DIMENSION_STEP = 4
"""Stored dimensions come in fours, the keys that an int8 dot product instruction takes at a time."""


@dataclass(frozen=True, kw_only=True)
class AquaSettings(Settings):
    """Settings of AQUA attention, given to vLLM as `additional_config={"aqua": {...}}`.

    Raises:
        ConfigError: a value has the wrong type or lies outside what is allowed.
    """

    key: ClassVar[str] = "aqua"

    calibration: str | None = None
    """File of `vllm-lrqk calibrate` for the served model."""
    keep: float = field(default=0.75, metadata={"above": 0.0, "maximum": 1.0})
    """Share of the stored dimensions that a decode step's scores use."""
    choose: str = field(default="kv_head", metadata={"choices": ("kv_head", "query_head")})
    """Who chooses them: "kv_head", one set for the query heads of a group, ranked by |q^| sigma, which is what saves
    memory traffic; "query_head", each head for itself by |q^|, as published."""
    stored: float = field(default=1.0, metadata={"above": 0.0, "maximum": 1.0})
    """Share of the dimensions that the cache holds, the leading ones; below 1 prefill is approximate as well."""
    key_dtype: str = field(default="auto", metadata={"choices": ("auto", "int8")})
    """Storage type of projected keys; "auto": the model's."""
    block_size: int = field(default=128, metadata={"choices": BLOCK_SIZES})
    """Tokens per block (vLLM's block size)."""

    def num_stored(self, head_size: int) -> int:
        """Dimensions that the cache holds, a multiple of DIMENSION_STEP."""
        steps = max(1, round(self.stored * head_size / DIMENSION_STEP))
        return min(steps * DIMENSION_STEP, head_size)

    def num_kept(self, head_size: int) -> int:
        """Dimensions that a decode step's scores use."""
        return max(1, round(self.keep * self.num_stored(head_size)))
