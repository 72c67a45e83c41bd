"""Scores of an output against its accepted answers: functions (output, answers) -> float in 0..1."""

import re
from collections import Counter
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


def first_answer(output: str, answers: Sequence[str]) -> float:
    """1 if the output's first word is the only answer."""
    return float(words_of(output)[:1] == words_of(answers[0]))


def json_pairs(output: str, answers: Sequence[str]) -> float:
    """Share of the answers "name: value" that the output has as members of JSON objects, whole or broken off.

    Of a name that comes several times the first value counts.
    """
    found: dict[str, str] = {}
    for name, value in re.findall(r'"([^"]+)"\s*:\s*"([^"]*)"', output):
        found.setdefault(name, value)
    return sum(found.get(name) == value for name, value in (answer.split(": ") for answer in answers)) / len(answers)


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


def token_f1(output: str, answers: Sequence[str]) -> float:
    """Best F1 of the bags of words (SQuAD; LongBench's qa_f1_score)."""
    return max(_f1(words_of(output), words_of(answer), _common) for answer in answers)


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """Best F1 of the longest common subsequence of words (ROUGE-L, Lin 2004; as LongBench uses it)."""
    return max(_f1(words_of(output), words_of(answer), longest_common_subsequence) for answer in answers)


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 if the output's first line is an answer, word by word."""
    first_line = (output.strip().splitlines() or [""])[0]
    return float(any(words_of(first_line) == words_of(answer) for answer in answers))


def classification(output: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """1 over the number of classes that the output names, if the right one is among them (LongBench).

    Classes that are part of an answer, such as "place" of "place of birth", are not counted.
    """
    named = [name for name in classes if name in output and not any(name in a and name != a for a in answers)]
    return 1 / len(named) if any(answer in named for answer in answers) else 0.0


def _common(first: list[str], second: list[str]) -> int:
    return sum((Counter(first) & Counter(second)).values())


def _f1(output: list[str], answer: list[str], overlap: Callable[[list[str], list[str]], int]) -> float:
    shared = overlap(output, answer)
    return 2 * shared / (len(output) + len(answer)) if shared else 0.0
