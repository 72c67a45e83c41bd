"""Layers with a sliding window beside those of a method: what they take of vLLM's pool of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_SIZES = (16, 32, 64, 128, 256)
MEMORY_SHARE = 0.25
"""Of the memory for keys and values, at most, that windows may take where they have to share."""


@dataclass(frozen=True)
class WindowLayers:
    """The layers of one rank that attend to a window.

    Args:
        window: tokens that a query attends to, its own included.
        layers: how many of them there are.
        bytes_per_token: of one layer's keys and values, all KV heads of the rank together.
    """

    window: int
    layers: int
    bytes_per_token: int


@dataclass(frozen=True)
class WindowPlan:
    """How windows lie in vLLM's blocks: groups of layers, each of which takes blocks of its own.

    A block is as wide as the widest group, that of the method's pages included, which is what vLLM's planner makes
    of a layout with the block outermost.
    """

    window: int
    layers: int
    bytes_per_token: int
    block_size: int
    """Tokens of a block."""
    groups: int
    block_bytes: int
    """Of a block of the pool."""

    def blocks_of(self, tokens: int) -> int:
        """Blocks of all groups for so many consecutive tokens, wherever in a block they begin."""
        return self.groups * (-(-tokens // self.block_size) + 1)

    def blocks_for(self, requests: int, tokens_in_flight: int) -> int:
        """Blocks of the windows of so many requests, and of the tokens that all of them together compute at once."""
        return requests * self.blocks_of(self.window) + self.blocks_of(tokens_in_flight)


def plan_windows(layers: WindowLayers, page_bytes: int, page_size: int) -> WindowPlan:
    """The block size of windows that leaves least of a request's blocks unused, without widening blocks if possible.

    Args:
        page_bytes: of one block of the method's layers, all of the rank together.
        page_size: tokens of such a block, a multiple of 16.
    """

    def plan(block_size: int) -> WindowPlan:
        own = layers.bytes_per_token * block_size
        groups = -(-layers.layers // max(1, page_bytes // own))
        widest = max(page_bytes, -(-layers.layers // groups) * own)
        return WindowPlan(layers.window, layers.layers, layers.bytes_per_token, block_size, groups, widest)

    found = [plan(size) for size in BLOCK_SIZES if page_size % size == 0]
    return min(found, key=lambda plan: (plan.block_bytes, plan.blocks_of(plan.window), plan.block_size))


def windows_served(plan: WindowPlan, memory_bytes: int, requests: int, tokens_in_flight: int) -> int:
    """Blocks for the windows of `requests` requests, or of as many as a share of the memory holds, but of one at least.

    Args:
        memory_bytes: for keys and values of all layers of the rank.
        tokens_in_flight: of all requests together in one step.
    """
    room = int(memory_bytes * MEMORY_SHARE) // plan.block_bytes - plan.blocks_for(0, tokens_in_flight)
    fitting = max(1, min(requests, room // plan.blocks_of(plan.window)))
    return plan.blocks_for(fitting, tokens_in_flight)


def full_attention_layers(layer_types: Sequence[str] | None, layers: int) -> list[int]:
    """Numbers of the layers that attend to all tokens.

    Args:
        layer_types: of a model's configuration, as transformers writes it; None: all layers are alike.
    """
    if layer_types is None:
        return list(range(layers))
    return [number for number, kind in enumerate(layer_types) if kind == "full_attention"]
