"""Which models with sliding windows are served: the same answer for an engine and for a plan."""

from collections.abc import Sequence
from typing import Any

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import Method

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers writes them in `layer_types`."""


def window_of(config: Any) -> int | None:
    """Tokens of the sliding window that layers of a model have; None where all layers attend to all tokens.

    Args:
        config: of the text model, as transformers gives it.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and SLIDING not in layer_types:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window


def check_windows(
    method: Method, name: str, window: int, layer_types: Sequence[str], pipeline_ranks: int, other: str
) -> None:
    """Refuse windows that are not served.

    Args:
        name: of the model.
        window: as `window_of` finds it.
        layer_types: of the model's configuration, as transformers writes it; empty where it has none.
        other: what to do instead, the end of a sentence.

    Raises:
        ConfigError: in one sentence.
    """
    kinds = set(layer_types)
    if not {FULL, SLIDING} <= kinds:
        raise ConfigError(
            f"{method.name} serves sliding-window layers beside full attention only, and {name} has a window of "
            f"{window} tokens in every layer: add --disable-sliding-window (this caps the context at the window), or "
            f"{other}"
        )
    if not method.serves_windows:
        raise ConfigError(f"{method.name} does not support sliding-window layers, which {name} has: {other}")
    if method.device_type != "cpu":
        raise ConfigError(
            f"{method.name} serves sliding-window layers on the CPU platform only, and {name} has them: {other}"
        )
    beside, odd = f"beside the sliding-window layers of {name}", sorted(kinds - {FULL, SLIDING})
    if odd:
        raise ConfigError(f"{method.name} does not support layers of kind {odd[0]!r} {beside}: {other}")
    if pipeline_ranks > 1:
        raise ConfigError(
            f"--pipeline-parallel-size is {pipeline_ranks}, which {method.name} does not support {beside}: set it to 1."
        )
