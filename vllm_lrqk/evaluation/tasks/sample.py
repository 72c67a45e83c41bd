"""What a task makes, and how its text is brought to a length in tokens."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_lrqk.evaluation.scorers import Scorer

CountTokens = Callable[[str], int]
MAX_COUNTS = 6  # texts that are tokenised to find one length
TOKENS_PER_UNIT = 12  # the first guess


Render = Callable[[Sequence[tuple[str, str]]], str]
"""A dialogue as one text: pairs of what a user says and what the answer is, of the last pair what it begins with."""


def plain(dialogue: Sequence[tuple[str, str]]) -> str:
    """One after the other, the answer after a space."""
    return "\n".join(f"{said} {answer.lstrip()}" if answer else said for said, answer in dialogue)


@dataclass(frozen=True)
class Question:
    """`completion` continues what the answer `begins` with, from its first character (a space) to the full stop."""

    text: str
    begins: str
    completion: str
    answers: tuple[str, ...]

    def max_tokens(self, count_tokens: CountTokens) -> int:
        """Tokens that an answer may take: those of the completion and a quarter, or eight, more."""
        tokens = count_tokens(self.completion)
        return tokens + max(8, tokens // 4)


@dataclass(frozen=True)
class Draft:
    """A text that can have any number of filler units, and the questions about it."""

    context: Callable[[int], str]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Task:
    """`draft(random, length, questions)` makes a text; where `turns` is false it has one question only.

    Where `instructs` is false no word says what to do: for models that continue what they saw before.
    """

    name: str
    description: str
    draft: Callable[[random.Random, int, int], Draft]
    scorer: Scorer
    turns: bool = False
    instructs: bool = True


@dataclass(frozen=True)
class Sample:
    """A prompt of at most the asked length less `max_tokens`, and what must follow it.

    `question` ends the prompt: all that comes after the text that is asked about.
    """

    prompt: str
    question: str
    completion: str
    answers: tuple[str, ...]
    max_tokens: int
    scorer: Scorer

    def score(self, output: str) -> float:
        """The task's score of a model's output, 0 to 1."""
        return self.scorer(output, self.answers)


def fit(context: Callable[[int], str], tokens: int, count_tokens: CountTokens) -> int:
    """The most filler units found for a text of at most `tokens` tokens, by interpolation.

    Raises ValueError if the text without filler is longer.
    """
    low, low_tokens = 0, count_tokens(context(0))
    if low_tokens > tokens:
        raise ValueError(f"{low_tokens - tokens} tokens too short")
    high: int | None = None
    guess = (tokens - low_tokens) // TOKENS_PER_UNIT
    for attempt in range(1, MAX_COUNTS):
        if guess <= low:
            break
        found = count_tokens(context(guess))
        per_unit = max((found - low_tokens) / (guess - low), 1e-6)
        wanted = (tokens - low_tokens) / per_unit * (1 - 0.002 * attempt)
        if found <= tokens:
            wanted -= guess - low
            low, low_tokens = guess, found
        else:
            high = guess
        guess = low + int(wanted)
        if high is not None:
            guess = min(guess, high - 1)
    return low
