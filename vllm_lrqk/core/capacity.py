"""What an engine has room for: one computation for its start-up line, vLLM's own figures and `vllm-lrqk plan`."""

from dataclasses import dataclass

from vllm_lrqk.core.method import MemoryPlan


@dataclass(frozen=True)
class HostTier:
    """How the CPU memory of one rank is cut into host pages."""

    memory_bytes: int
    page_bytes: int
    """Of one page, all layers of the rank together."""

    @classmethod
    def of(cls, plan: MemoryPlan, heads: int, memory_bytes: int) -> "HostTier | None":
        """The host tier of a rank with so many KV heads in all its layers; None where the method has none."""
        page_bytes = heads * plan.block_size * plan.host_bytes_per_token
        return cls(memory_bytes, page_bytes) if page_bytes else None

    @property
    def num_pages(self) -> int:
        """Host pages, the null block's included."""
        return self.memory_bytes // self.page_bytes


@dataclass(frozen=True)
class Capacity:
    """The pool of blocks of one rank, and the host pages beside it.

    Args:
        plan: of one KV head of one layer.
        heads: KV heads of all layers of the rank.
        dense_bytes_per_head: of one token's key and value in one KV head.
        num_blocks: of vLLM's pool, the null block included.
        host_pages: ids below this have a host page, the null block's included; None without a host tier.
        max_requests: requests that run at once (vLLM's `max_num_seqs`).
        least_block_bytes: of a block, where other layers than these are what makes it wide.
        other_blocks: of the pool, those of other layers alone.
        other_requests: that other layers have blocks for at once; None: any number.
    """

    plan: MemoryPlan
    heads: int
    dense_bytes_per_head: int
    num_blocks: int
    host_pages: int | None
    max_requests: int
    least_block_bytes: int = 0
    other_blocks: int = 0
    other_requests: int | None = None

    @property
    def block_bytes(self) -> int:
        """Of one block of the pool."""
        return max(self.heads * self.plan.block_bytes, self.least_block_bytes)

    @property
    def own_blocks(self) -> int:
        """Blocks of the pool that are not other layers', the null block included."""
        return self.num_blocks - self.other_blocks

    @property
    def device_bytes_per_token(self) -> int:
        """0 where memory does not grow with a request's tokens."""
        return self.heads * self.plan.bytes_per_token if self.plan.is_paged else 0

    @property
    def device_bytes_per_request(self) -> int:
        """What a request takes however many tokens it has."""
        return self.block_bytes * self.plan.blocks_per_request

    @property
    def host_bytes_per_token(self) -> int:
        return self.heads * self.plan.host_bytes_per_token

    @property
    def dense_bytes_per_token(self) -> int:
        """What dense attention takes on the device."""
        return self.heads * self.dense_bytes_per_head

    @property
    def device_tokens(self) -> int:
        """Tokens that the pool would hold if no request owned blocks."""
        return self.own_blocks * self.plan.block_size

    @property
    def host_tokens(self) -> int | None:
        """Tokens that the host pages hold."""
        return None if self.host_pages is None else (self.host_pages - 1) * self.plan.block_size

    @property
    def dense_tokens(self) -> int:
        """Tokens for which dense attention would have room in the pool's memory."""
        return self.own_blocks * self.block_bytes // self.dense_bytes_per_token

    def blocks_of(self, length: int) -> tuple[int, int]:
        """Pages and constant blocks that a request of so many tokens takes."""
        pages = -(-length // self.plan.block_size) if self.plan.is_paged else 0
        return pages, self.plan.blocks_per_request

    def requests(self, length: int) -> int:
        """Requests of so many tokens that run at once, `max_requests` at most."""
        pages, constant = self.blocks_of(length)
        found = min(self.max_requests, (self.own_blocks - 1) // (pages + constant))
        if self.host_pages is not None:
            found = min(found, (self.host_pages - 1) // pages)
        if self.other_requests is not None:
            found = min(found, self.other_requests)
        return max(0, found)

    def limit(self, length: int) -> str:
        """What keeps one more request of so many tokens out."""
        more = self.requests(length) + 1
        pages, _ = self.blocks_of(length)
        if more > self.max_requests:
            return "max_num_seqs"
        if self.host_pages is not None and more * pages > self.host_pages - 1:
            return "host memory"
        if self.other_requests is not None and more > self.other_requests:
            return "windows"
        return "device memory"

    def tokens(self, length: int) -> int:
        """Tokens of running and cached requests that there is room for, where requests have so many tokens each.

        Blocks that requests own lie first where no page can.
        """
        pages, constant = self.blocks_of(length)
        usable = self.own_blocks - 1
        if not self.plan.is_paged:
            return usable // constant * length
        owned = int(constant * min(self.max_requests, usable / (pages + constant)))
        room = usable - owned if self.host_pages is None else min(usable - owned, self.host_pages - 1)
        return max(0, room) * self.plan.block_size


def backed_blocks(plan: MemoryPlan, host: HostTier, max_requests: int) -> int:
    """Blocks of a pool that holds all host pages, and beside them what `max_requests` requests own."""
    return host.num_pages + plan.blocks_per_request * max_requests
