"""KV heads of each layer, for the models whose configuration says that layers differ."""

from collections.abc import Sequence
from typing import Any


def _field(container: Any, name: str) -> Any:
    return container.get(name) if isinstance(container, dict) else getattr(container, name, None)


def kv_heads_of_blocks(config: Any, heads: int) -> list[int] | None:
    """KV heads of each layer of a model with `block_configs` (Nemotron NAS); None for every other one.

    Args:
        config: of the text model, as transformers gives it.
        heads: query heads of each layer.
    """
    blocks = getattr(config, "block_configs", None)
    found = []
    for block in blocks or ():
        attention = _field(block, "attention")
        if attention is None:
            return None
        group = _field(attention, "n_heads_in_group")
        found.append(0 if _field(attention, "no_op") or not group else heads // group)
    return found or None


def rank_heads(kv_heads: Sequence[int], tensor_ranks: int, stages: Sequence[tuple[int, int]]) -> int:
    """KV heads of all layers of the rank that has most.

    Args:
        kv_heads: of each layer; 0 where it has no attention.
        tensor_ranks: that a layer's heads are divided over; heads that are too few are repeated.
        stages: first and past-the-last layer of each pipeline stage.
    """
    own = [max(1, count // tensor_ranks) if count else 0 for count in kv_heads]
    return max(sum(own[start:end]) for start, end in stages)
