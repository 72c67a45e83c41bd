"""Drafted tokens for engines that speculate: vLLM's n-gram drafter, or one that knows what will be sampled."""

import random
from typing import Any

from vllm.platforms import current_platform
from vllm.triton_utils import dispatcher

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}


def start_beside_numba() -> None:
    """Let engines start in a process in which vLLM's n-gram drafter has run, which loads numba.

    vLLM 0.32 replaces Triton kernels at each start, and the second time its search fails on numba's modules.
    """
    register = current_platform.register_triton_kernel_overrides

    def register_once() -> None:
        if not dispatcher._registry:
            register()

    type(current_platform).register_triton_kernel_overrides = staticmethod(register_once)


start_beside_numba()


class KnowingDrafter:
    """Takes the place of an engine's n-gram drafter: drafts what requests will sample, wrong at a random place.

    Args:
        llm: an engine with `NGRAM` whose worker runs in this process.
    """

    def __init__(self, llm: Any, seed: int = 0) -> None:
        self.sequences: dict[tuple[int, ...], list[int]] = {}
        self.generator = random.Random(seed)
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        runner.drafter.propose = self.propose

    def know(self, prompt: Any, answer: list[int]) -> None:
        """Tell what a prompt is answered with."""
        self.sequences[tuple(prompt["prompt_token_ids"])] = answer

    def propose(
        self, count: int, sampled: Any, lengths: Any, tokens: Any, slot_mappings: Any = None
    ) -> list[list[int]]:
        """As `NgramProposer.propose`: up to `count` tokens behind the tokens of each request that sampled one."""
        return [self._draft(count, tokens[i, : lengths[i]].tolist()) if ids else [] for i, ids in enumerate(sampled)]

    def _draft(self, count: int, known: list[int]) -> list[int]:
        draft: list[int] = []
        for prompt, answer in self.sequences.items():
            so_far = known[len(prompt) :]
            if tuple(known[: len(prompt)]) == prompt and answer[: len(so_far)] == so_far:
                draft = answer[len(so_far) :][: self.generator.randint(0, count)]
        if not draft:
            draft = [self.generator.randrange(512)] * self.generator.randint(0, count)
        elif self.generator.random() < 0.5:
            wrong = self.generator.randrange(len(draft))
            draft[wrong] = (draft[wrong] + 1) % 512
        return draft


def acceptance(llm: Any) -> tuple[int, int]:
    """Tokens drafted and accepted by an engine that logs statistics."""
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    drafted, accepted = (int(counted[name]) for name in names)
    return drafted, accepted
