"""Counters that kernels advance on the device, read without waiting for it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceCounts:
    """What the device had counted when a copy began; sums over layers, requests and KV heads since start-up."""

    rows_hit: int
    rows_missed: int
    pages_in_use: int


class DeviceCounters:
    """Rows hit and missed of every layer of one worker."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self.rows = torch.zeros(layers, 2, dtype=torch.int64, device=device)
        """Rows hit and rows missed of each layer."""
        self._copy = torch.zeros(3, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._arrival: torch.cuda.Event | None = None
        self.is_copying = False
        """Whether a copy was begun whose counts `arrived` has not handed out."""

    def start_copy(self, pages_in_use: torch.Tensor) -> None:
        """Begin to copy the counts to the host; `pages_in_use` is int64 [] on the device."""
        self._copy.copy_(torch.cat([self.rows.sum(0), pages_in_use[None]]), non_blocking=True)
        if self.rows.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()
        self.is_copying = True

    def arrived(self) -> DeviceCounts | None:
        """The counts of the copy that was begun, once; None while it is on its way or none was begun."""
        if not self.is_copying or (self._arrival is not None and not self._arrival.query()):
            return None
        self.is_copying = False
        return DeviceCounts(*self._copy.tolist())

    def wait(self) -> tuple[int, int]:
        """Rows hit and missed by now, after waiting for the device."""
        hit, missed = self.rows.sum(0).tolist()
        return hit, missed
