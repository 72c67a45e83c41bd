"""Decode steps that take given tokens, so that two attention methods can be scored on the same text."""

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

FORCED_TOKENS = "lrqk_forced_tokens"
"""Key of `SamplingParams.extra_args`: the ids of a request's first output tokens."""


class ForcedTokens(AdapterLogitsProcessor):
    """vLLM's logits processor that leaves a forced token as the only choice.

    Log-probabilities that a request asks for are those before it: vLLM takes them from the raw logits.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams):
        forced = (params.extra_args or {}).get(FORCED_TOKENS)
        if not forced:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            step = len(output_ids)
            if step >= len(forced):
                return logits
            only = torch.full_like(logits, -torch.inf)
            only[forced[step]] = 0.0
            return only

        return force
