"""What a layer does to its attention logits beside scaling them: soft caps (Gemma 2) and learned sinks (gpt-oss)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Logits:
    """Of one layer."""

    cap: float = 0.0
    """Each logit becomes cap tanh(logit / cap); 0: it stays."""
    sinks: torch.Tensor | None = None
    """float32 [H], a logit of each query head that only the denominator of its softmax has; None: there are none."""

    @property
    def is_plain(self) -> bool:
        return not self.cap and self.sinks is None

    def capped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores behind the soft cap."""
        return self.cap * torch.tanh(scores / self.cap) if self.cap else scores

    def beside_sinks(self, output: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
        """Attention in whose denominators the sinks are, from attention without them.

        Args:
            output: float32 [H, ..., d].
            log_sum: float32 [H, ...], log-sum-exp of its logits.
        """
        if self.sinks is None:
            return output
        share = torch.sigmoid(log_sum - self.sinks.view(-1, *(1,) * (log_sum.dim() - 1)))
        return output * share[..., None]


PLAIN = Logits()
