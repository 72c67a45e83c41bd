"""Layers with a sliding window beside those of a method: what they take of vLLM's pool of blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_lrqk.core.capacity import HostTier
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import MemoryPlan

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


@dataclass(frozen=True)
class Windows:
    """Layers with a sliding window beside the method's, and the block ids that are theirs."""

    plan: WindowPlan
    blocks: range
    requests: int
    """That these blocks hold the windows of at once."""

    @property
    def bytes_per_request(self) -> int:
        """What a request's windows take, however many tokens it has."""
        return self.plan.blocks_of(self.plan.window) * self.plan.block_bytes


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


def windows_beside(
    layers: WindowLayers,
    plan: MemoryPlan,
    heads: int,
    memory_bytes: int,
    requests: int,
    tokens_in_flight: int,
    pool_bytes: int | None = None,
    pool_blocks: int | None = None,
) -> tuple[Windows, HostTier]:
    """What windows take of a rank's memory for keys and values, and the host tier of the rest.

    Args:
        plan: of the method, which has a host tier.
        heads: KV heads of all layers of the rank that the method serves.
        memory_bytes: for keys and values of all layers of the rank.
        requests: that run at once (vLLM's `max_num_seqs`).
        tokens_in_flight: of all requests together in one step.
        pool_bytes, pool_blocks: of vLLM's pool, where the user has sized it; the blocks have the say.

    Raises:
        ConfigError: the pool that was asked for is too small for the windows.
    """
    windows = plan_windows(layers, heads * plan.block_bytes, plan.block_size)
    count = windows_served(windows, memory_bytes, requests, tokens_in_flight)
    host = HostTier.of(plan, heads, memory_bytes - count * windows.block_bytes)
    assert host is not None
    if pool_blocks is None and pool_bytes is not None:
        pool_blocks = pool_bytes // windows.block_bytes
    if pool_blocks is not None:
        if pool_blocks < count + 2:
            raise ConfigError(
                f"--kv-cache-memory-bytes or --num-gpu-blocks-override gives {pool_blocks} blocks, but the sliding "
                f"windows of --max-num-seqs {requests} requests take {count}: leave it out, or lower --max-num-seqs."
            )
        host = HostTier(min(host.num_pages, pool_blocks - count) * host.page_bytes, host.page_bytes)
    served = (count - windows.blocks_of(tokens_in_flight)) // windows.blocks_of(windows.window)
    return Windows(windows, range(host.num_pages, host.num_pages + count), served), host


def full_attention_layers(layer_types: Sequence[str] | None, layers: int) -> list[int]:
    """Numbers of the layers that attend to all tokens.

    Args:
        layer_types: of a model's configuration, as transformers writes it; None: all layers are alike.
    """
    if layer_types is None:
        return list(range(layers))
    return [number for number, kind in enumerate(layer_types) if kind == "full_attention"]
