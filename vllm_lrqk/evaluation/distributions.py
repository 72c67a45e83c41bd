"""Next-token distributions of dense attention, and how far another method's are from them.

Of a distribution the `KEPT` most probable tokens are kept; all others count as one. The divergence of two such
distributions is at most that of the whole ones (data processing inequality), and equal to it where the vocabulary has
no more than `KEPT` tokens.
"""

from pathlib import Path

import numpy
import torch

from vllm_lrqk.evaluation.errors import EvaluationError

KEPT = 1024


class Distributions:
    """A file of one text's distributions, [steps] of token ids and log-probabilities.

    Rows are written in place, so that a request whose steps come from several objects (it was preempted) is whole.
    """

    def __init__(self, file: Path, mode: str = "r+") -> None:
        self._rows = numpy.lib.format.open_memmap(file, mode)

    @staticmethod
    def create(file: Path, steps: int, vocabulary: int) -> None:
        """A file in which nothing has been written yet."""
        kept = min(KEPT, vocabulary)
        row = numpy.dtype([("id", numpy.int32, (kept,)), ("logprob", numpy.float32, (kept + 1,))])
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = numpy.lib.format.open_memmap(file, "w+", row, (steps,))
        rows["logprob"] = numpy.nan
        rows.flush()

    def write(self, step: int, logits: torch.Tensor) -> None:
        """Keep the distribution of `logits` [V]."""
        ids = logits.topk(self._rows["id"].shape[1]).indices
        self._rows["id"][step] = ids.int().cpu().numpy()
        self._rows["logprob"][step] = _logprobs(logits, ids).cpu().numpy()

    def divergence(self, step: int, logits: torch.Tensor) -> float:
        """Kullback-Leibler divergence of `logits` [V] from the kept distribution p, sum of p log(p / q), in nats."""
        ids = torch.from_numpy(self._rows["id"][step].astype(numpy.int64)).to(logits.device)
        theirs = torch.from_numpy(self._rows["logprob"][step].copy()).double()
        ours = _logprobs(logits, ids).double().cpu()
        present = theirs > -torch.inf
        return float((theirs.exp() * (theirs - ours))[present].sum())

    def check(self, file: Path) -> None:
        """Raises EvaluationError if a step is missing."""
        if numpy.isnan(self._rows["logprob"]).any():
            raise EvaluationError(f"{file} is incomplete: delete it and run the evaluation again.")


def _logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `ids` [K], and of all other tokens together: float32 [K + 1]."""
    logprobs = logits.float().log_softmax(-1)
    others = logprobs.clone()
    others[ids] = -torch.inf
    return torch.cat([logprobs[ids], others.logsumexp(-1, keepdim=True)])


def create_divergences(file: Path, steps: int) -> None:
    """A file for a divergence per step, in which nothing has been written yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    numpy.save(file, numpy.full(steps, numpy.nan))


def write_divergence(file: Path, step: int, value: float) -> None:
    numpy.lib.format.open_memmap(file, "r+")[step] = value


def take_divergences(file: Path) -> list[float]:
    """What was written, after which the file is gone. Raises EvaluationError if a step is missing."""
    values = numpy.load(file)
    file.unlink()
    if numpy.isnan(values).any():
        raise EvaluationError(f"{file} is incomplete: run the evaluation again.")
    return values.tolist()
