"""Counts of what the layers of one worker did: what the host knows, and what the device counts by itself."""

import torch


class Counters:
    """Sums over layers, requests and KV heads since start-up.

    Args:
        tallies: names of what kernels count on the device.
        layers: of the worker.
        device: where they count.
    """

    def __init__(self, tallies: tuple[str, ...], layers: int, device: torch.device) -> None:
        self.names = tallies
        self.tallies = torch.zeros(layers, len(tallies), dtype=torch.int64, device=device)
        """int64 [layers, tallies]"""
        self.decode_tokens = 0
        """Decode queries answered (one per request, step and layer)."""
        self.pages_sealed = 0
        self._copy = torch.zeros(len(tallies) + 1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrival: torch.cuda.Event | None = None
        self._glance = torch.zeros_like(self.tallies, device="cpu", pin_memory=device.type == "cuda")
        self._glance_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.is_copying = False
        """Whether a copy was begun whose counts `arrived` has not handed out."""

    def start_copy(self, pages_in_use: torch.Tensor) -> None:
        """Begin to copy the tallies to the host; `pages_in_use` is int64 [] on the device."""
        self._copy.copy_(torch.cat([self.tallies.sum(0), pages_in_use[None]]), non_blocking=True)
        if self.tallies.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()
        self.is_copying = True

    def arrived(self) -> tuple[dict[str, int], int] | None:
        """Counts, and pages in use, of the copy that was begun, once; None while it is on its way or none was begun."""
        if not self.is_copying or (self._arrival is not None and not self._arrival.query()):
            return None
        self.is_copying = False
        *tallies, pages_in_use = self._copy.tolist()
        return self._counts(tallies), pages_in_use

    def wait(self) -> dict[str, int]:
        """Counts by now, after waiting for the device."""
        return self._counts(self.tallies.sum(0).tolist())

    def glance(self) -> dict[str, int]:
        """Counts as far as the device has come, for another thread than that of the steps: waits for none of them."""
        if self._glance_stream is not None:
            with torch.cuda.stream(self._glance_stream):
                self._glance.copy_(self.tallies, non_blocking=True)
            self._glance_stream.synchronize()
        rows = (self.tallies if self._glance_stream is None else self._glance).tolist()
        return self._counts([sum(column) for column in zip(*rows)])

    def _counts(self, tallies: list[int]) -> dict[str, int]:
        on_host = {"decode_tokens": self.decode_tokens, "pages_sealed": self.pages_sealed}
        return on_host | dict(zip(self.names, tallies))
