"""Counts of what the decode path did, per engine process."""

from dataclasses import asdict, dataclass


@dataclass
class Counters:
    """Sums over layers, requests and KV heads since start-up."""

    decode_tokens: int = 0
    """Decode queries answered (one per request, step and layer)."""
    rows_attended: int = 0
    """Rows attended exactly by those queries."""
    rows_hit: int = 0
    """Attended rows that were in the hot cache."""
    rows_missed: int = 0
    """Attended rows that were fetched from the host pages into the hot cache."""
    bytes_fetched: int = 0
    pages_sealed: int = 0

    @property
    def hit_rate(self) -> float:
        looked_up = self.rows_hit + self.rows_missed
        return self.rows_hit / looked_up if looked_up else 0.0

    def since(self, earlier: "Counters") -> "Counters":
        return Counters(**{key: value - getattr(earlier, key) for key, value in asdict(self).items()})
