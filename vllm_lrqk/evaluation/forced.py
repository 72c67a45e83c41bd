"""Decode steps that take given tokens, so that two attention methods can be scored on the same text."""

from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_lrqk.evaluation.distributions import Distributions, write_divergence

FORCED_TOKENS = "lrqk_forced_tokens"
"""Key of `SamplingParams.extra_args`: the ids of a request's first output tokens."""
DISTRIBUTIONS = "lrqk_distributions"
"""Key: the file of distributions that forced steps write or, with `DIVERGENCES`, are compared with."""
DIVERGENCES = "lrqk_divergences"
"""Key: the file that the comparison is written to."""


class ForcedTokens(AdapterLogitsProcessor):
    """vLLM's logits processor that leaves a forced token as the only choice.

    Log-probabilities that a request asks for are those before it: vLLM takes them from the raw logits.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        arguments = params.extra_args or {}
        return _Forced(arguments) if arguments.get(FORCED_TOKENS) else None


class _Forced:
    """One request's steps."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._tokens: list[int] = arguments[FORCED_TOKENS]
        file, divergences = arguments.get(DISTRIBUTIONS), arguments.get(DIVERGENCES)
        self._distributions = Distributions(Path(file)) if file else None
        self._divergences = Path(divergences) if divergences else None

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        step = len(output_ids)
        if step >= len(self._tokens):
            return logits
        if self._distributions is not None:
            if self._divergences is None:
                self._distributions.write(step, logits)
            else:
                write_divergence(self._divergences, step, self._distributions.divergence(step, logits))
        only = torch.full_like(logits, -torch.inf)
        only[self._tokens[step]] = 0.0
        return only
