"""Scores of an output against its accepted answers: functions (output, answers) -> float in 0..1."""

import re
from collections.abc import Callable, Sequence

Scorer = Callable[[str, Sequence[str]], float]


def words_of(text: str) -> list[str]:
    """Lower-case words; punctuation and articles count for nothing (the normalisation of SQuAD and LongBench)."""
    return [word for word in re.findall(r"[^\W_]+", text.lower()) if word not in ("a", "an", "the")]


def _contains(output: str, answer: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(answer.lower())}(?![\w-])", output.lower()) is not None


def all_answers(output: str, answers: Sequence[str]) -> float:
    """Share of the answers that occur as whole words (RULER's string_match_all)."""
    return sum(_contains(output, answer) for answer in answers) / len(answers)


def any_answer(output: str, answers: Sequence[str]) -> float:
    """1 if one of the answers occurs as whole words (RULER's string_match_part)."""
    return float(any(_contains(output, answer) for answer in answers))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in this order."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            diagonal, row[column] = row[column], diagonal + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]


def words_in_order(output: str, answers: Sequence[str]) -> float:
    """Share of the only answer's words that the output has in their order."""
    expected = answers[0].split()
    return longest_common_subsequence(expected, output.replace(".", " ").split()) / len(expected)
