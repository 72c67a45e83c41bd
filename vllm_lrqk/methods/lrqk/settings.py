"""The settings of LRQK."""

from dataclasses import dataclass, field
from typing import ClassVar

from vllm_lrqk.core.config import ConfigError, Settings

PAGE_SIZES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class LRQKSettings(Settings):
    """Settings of LRQK attention, given to vLLM as `additional_config={"lrqk": {...}}`.

    Raises:
        ConfigError: a value has the wrong type or lies outside what is allowed.
    """

    key: ClassVar[str] = "lrqk"

    rank: int = field(default=16, metadata={"minimum": 4, "multiple_of": 4})
    """Columns of a page's key factor; a multiple of 4, at most the model's head size."""
    page_size: int = field(default=256, metadata={"choices": PAGE_SIZES})
    """Tokens per page (vLLM's block size)."""
    top_k: int = field(default=2048, metadata={"minimum": 1})
    """Tokens selected per KV head and decode step."""
    top_p: float = field(default=1.0, metadata={"above": 0.0, "maximum": 1.0})
    """Of these only as many as carry this share of the candidates' summed proxy weight; 1: all of them."""
    recent_tokens: int = field(default=64, metadata={"minimum": 1})
    """Latest tokens that are always attended exactly (the current one included)."""
    sink_tokens: int = field(default=4, metadata={"minimum": 0})
    """First tokens that are always attended exactly."""
    residual: str = field(default="linear", metadata={"choices": ("linear", "mean", "none")})
    """Tokens that are not selected count through their proxy score and, "linear": a value that is linear in their
    key factor; "mean": their page's mean value; "none": not at all."""
    value_rank: int | None = field(default=None, metadata={"minimum": 4, "multiple_of": 4})
    """Columns of the key factor that the values of `residual: "linear"` follow; a multiple of 4, at most `rank`;
    default: all."""
    factorization: str = field(default="lrqk", metadata={"choices": ("lrqk", "key_pca", "calibrated")})
    """How a page's keys are factorised: by LRQK's updates, by their principal components, or in the basis of a
    calibration file, with `rank` columns in int8 and as many again in 4 bits. A function of the page's tokens alone."""
    calibration: str | None = None
    """File of `vllm-lrqk calibrate` for the served model, for `factorization: "calibrated"`."""
    value_map: str = field(default="page", metadata={"choices": ("page", "calibrated")})
    """With calibrated factors, the map from key factors to values: each page's own, in 4 bits, or the calibration's."""
    factor_dtype: str = field(default="int8", metadata={"choices": ("int8", "bfloat16")})
    """Storage type of the factors."""
    iterations: int = field(default=3, metadata={"minimum": 1})
    """Alternating updates per page."""
    lambda_q: float = field(default=1.0, metadata={"above": 0.0})
    """Weight of the query reconstruction term."""
    lambda_k: float = field(default=1.0, metadata={"above": 0.0})
    """Weight of the key reconstruction term."""
    hot_cache: bool | str = field(default="auto", metadata={"choices": ("auto", True, False)})
    """Keep recently used rows in device memory; "auto": where host and device memory differ."""
    hot_rows: int | None = field(default=None, metadata={"minimum": 1})
    """Rows of the hot cache per request and KV head; default: what one step can attend, plus a quarter."""
    host_memory_gib: float | None = field(default=None, metadata={"above": 0.0})
    """CPU memory for full-precision keys and values of all ranks of one host; default: half of what is free."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = self.attended_rows
        if self.hot_rows is not None and self.hot_rows < least:
            raise ConfigError(
                f"lrqk.hot_rows is {self.hot_rows}, but one step can attend {least} rows "
                f"(top_k + recent_tokens + sink_tokens + page_size): set it to {least} or more."
            )
        if self.is_calibrated:
            self._check_calibrated()

    def _check_calibrated(self) -> None:
        if self.rank % 8:
            raise ConfigError(
                f'lrqk.rank is {self.rank}, but must be a multiple of 8 with factorization "calibrated", '
                "whose trailing columns come in eights."
            )
        for name, value, only in (("factor_dtype", self.factor_dtype, "int8"), ("value_rank", self.value_rank, None)):
            if value != only:
                raise ConfigError(
                    f'lrqk.{name} is {value!r}, but factorization "calibrated" has its own: leave it out.'
                )

    @property
    def is_calibrated(self) -> bool:
        """Whether factors are in a basis of a calibration file."""
        return self.factorization == "calibrated"

    @property
    def attended_rows(self) -> int:
        """Rows that one decode step attends exactly, at most, per KV head."""
        return self.top_k + self.recent_tokens + self.sink_tokens + self.page_size

    @property
    def num_value_ranks(self) -> int:
        """Columns of the key factor that values are estimated from; 0 without linear values."""
        return min(self.value_rank or self.rank, self.rank) if self.residual == "linear" else 0

    @property
    def num_hot_rows(self) -> int:
        """Rows of the hot cache per request and KV head."""
        return self.hot_rows if self.hot_rows is not None else self.attended_rows * 5 // 4
