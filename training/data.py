"""Batches of one length: rows of text, of tasks with their answers, and of repeated tokens."""

import random
from collections.abc import Sequence

import torch
from corpus import repeated_tokens
from transformers import PreTrainedTokenizerFast

from vllm_lrqk.evaluation.tasks import TASKS, make_conversation

NOT_LEARNED = ("passage", "text_to_json", "common_vote", "frequent_vote")
"""The words of `passage` are many tokens each: it would leave no room in a row. The others came after the model."""
LEARNED = [name for name in TASKS if name not in NOT_LEARNED]
SHARES = {"task": 0.55, "text": 0.25, "repeated": 0.2}
FIRST_SHARES = {"task": 0.15, "text": 0.15, "repeated": 0.7}
"""Of rows, at first: copying is learned from repeated tokens, and the tasks build on it."""
WEIGHTS = {"answer": 2.0, "prompt": 0.03, "text": 0.5, "copy": 1.0}
"""Loss weights of tokens. Most of a prompt is random on purpose, and answers are few."""
TOKENS_PER_TURN = 128
"""Length of a row over the most questions about its text, where a task allows several: answers are few, and all there
is to learn from."""


class Batches:
    """Random batches of token rows and their loss weights."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        tokens: list[int] = []
        for text in texts:
            tokens += [*self.encode(text), 0]
        self.text = torch.tensor(tokens)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def make(self, rows: int, length: int, shares: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """int64 [rows, length + 1] tokens; float32 [rows, length] weight of each next token; the kind of each row."""
        tokens = torch.zeros(rows, length + 1, dtype=torch.long)
        weights = torch.zeros(rows, length)
        kinds = self.random.choices([*shares], [*shares.values()], k=rows)
        for i, kind in enumerate(kinds):
            if kind == "text":
                start = self.random.randrange(len(self.text) - length - 1)
                tokens[i], weights[i] = self.text[start : start + length + 1], WEIGHTS["text"]
            elif kind == "repeated":
                row, is_copy = repeated_tokens(self.random, length + 1, range(1, len(self.tokenizer)))
                tokens[i], weights[i] = torch.tensor(row), torch.tensor(is_copy[1:]) * WEIGHTS["copy"]
            else:
                row, weight = self._task(length)
                tokens[i, : len(row)] = torch.tensor(row)
                weights[i, : len(weight) - 1] = torch.tensor(weight[1:])
        return tokens, weights, kinds

    def _task(self, length: int) -> tuple[list[int], list[float]]:
        count = lambda text: len(self.encode(text))  # noqa: E731
        while True:
            name = self.random.choice(LEARNED)
            turns = self.random.randint(1, max(4, length // TOKENS_PER_TURN)) if TASKS[name].turns else 1
            try:
                questions = make_conversation(name, length, count, self.random.getrandbits(32), turns)
            except ValueError:
                continue  # the task does not fit this length
            row: list[int] = []
            weight: list[float] = []
            said = ""
            for question in questions:
                for text, kind in ((question.prompt[len(said) :], "prompt"), (question.completion, "answer")):
                    part = self.encode(text)
                    row += part
                    weight += [WEIGHTS[kind]] * len(part)
                said = question.prompt + question.completion
            row, weight = [*row, 0][: length + 1], [*weight, WEIGHTS["answer"]][: length + 1]
            return row, weight
