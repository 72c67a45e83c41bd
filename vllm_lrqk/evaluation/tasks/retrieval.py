"""Needles in a haystack (RULER, arXiv 2404.06654, section 3.1), and passages to be repeated."""

import random

from vllm_lrqk.evaluation.tasks.sample import Draft, Question
from vllm_lrqk.evaluation.tasks.words import (
    ADJECTIVES,
    CODED_WORDS,
    MANY_CODED_WORDS,
    NOUNS,
    Stream,
    distinct,
    listing,
    prose,
    scatter,
)

INSTRUCTION = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)


class _Needles:
    """Keys and values that occur once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._keys: set[str] = set()
        self._values: set[str] = set()

    def key(self) -> str:
        # Three words where the text is so long that pairs run out.
        few = len(self._keys) < len(ADJECTIVES) * len(NOUNS) // 2
        lists = [ADJECTIVES, NOUNS] if few else [ADJECTIVES, NOUNS, NOUNS]
        return distinct(lambda: "-".join(map(self._rng.choice, lists)), self._keys)

    def value(self) -> str:
        def draw() -> str:
            digits = self._rng.randint(4, 7)
            return str(self._rng.randrange(10 ** (digits - 1), 10**digits))

        return distinct(draw, self._values)


def _sentence(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _question(keys: list[str], values: list[str]) -> Question:
    asked = listing(keys)
    if len(values) == 1:
        text = f"What is the special magic number for {asked} mentioned in the provided text?"
        begins = f"The special magic number for {asked} mentioned in the provided text is"
    else:
        text = f"What are all the special magic numbers for {asked} mentioned in the provided text?"
        begins = f"The special magic numbers for {asked} mentioned in the provided text are"
    return Question(text, begins, f" {listing(values)}.", tuple(values))


def _draft(inserts: list[tuple[float, str]], filler: Stream, questions: list[Question]) -> Draft:
    return Draft(lambda units: f"{INSTRUCTION}\n{scatter(filler.take(units), inserts)}\n", tuple(questions))


def single(rng: random.Random, length: int, questions: int) -> Draft:
    """One needle in prose for every question."""
    needles = _Needles(rng)
    pairs = [(needles.key(), needles.value()) for _ in range(questions)]
    inserts = [(rng.random(), _sentence(*pair)) for pair in pairs]
    return _draft(inserts, prose(rng), [_question([key], [value]) for key, value in pairs])


def multikey(rng: random.Random, length: int, questions: int) -> Draft:
    """As `single`, and every fourth sentence of the filler is a needle that nobody asks for, three at least."""
    needles = _Needles(rng)
    pairs = [(needles.key(), needles.value()) for _ in range(questions + 3)]
    inserts = [(rng.random(), _sentence(*pair)) for pair in pairs]
    sentences = prose(rng)
    drawn = iter(range(1 << 62))

    def draw() -> str:
        number = next(drawn)
        return _sentence(needles.key(), needles.value()) if number % 4 == 3 else sentences.take(number + 1)[number]

    return _draft(inserts, Stream(draw), [_question([key], [value]) for key, value in pairs[:questions]])


def _how_many(length: int) -> int:
    return 2 if length < 512 else 3 if length < 1024 else 4


def multivalue(rng: random.Random, length: int, questions: int) -> Draft:
    """One key has several numbers, and all are asked for, in the order of the text."""
    needles = _Needles(rng)
    key, values = needles.key(), [needles.value() for _ in range(_how_many(length))]
    depths = sorted(rng.random() for _ in values)
    inserts = [(depth, _sentence(key, value)) for depth, value in zip(depths, values)]
    return _draft(inserts, prose(rng), [_question([key], values)])


def multiquery(rng: random.Random, length: int, questions: int) -> Draft:
    """Several keys, and the numbers of all are asked for in one question."""
    needles = _Needles(rng)
    keys = [needles.key() for _ in range(_how_many(length))]
    values = [needles.value() for _ in keys]
    inserts = [(rng.random(), _sentence(key, value)) for key, value in zip(keys, values)]
    return _draft(inserts, prose(rng), [_question(keys, values)])


def needle(rng: random.Random, length: int, questions: int) -> Draft:
    """Coded words without any instruction; a sentence's first word is given and the rest must follow."""
    return _sentences_of_words(rng, CODED_WORDS, 10, questions)


def passage(rng: random.Random, length: int, questions: int) -> Draft:
    """As `needle`, but the sentence is an eighth of the length, in words: a long answer."""
    return _sentences_of_words(rng, MANY_CODED_WORDS, min(length // 8, 1024), questions)


def _sentences_of_words(rng: random.Random, coded_words: list[str], words_each: int, questions: int) -> Draft:
    words = rng.sample(coded_words, len(coded_words))
    sentences = [words[i * words_each : (i + 1) * words_each] for i in range(questions)]
    filler_words = words[questions * words_each :]
    inserts = [(rng.random(), " ".join(sentence)) for sentence in sentences]
    filler = Stream(lambda: " ".join(rng.choices(filler_words, k=8)))
    asked = [Question(first, "", f" {' '.join(rest)}.", (" ".join(rest),)) for first, *rest in sentences]
    return Draft(lambda units: f"{scatter(filler.take(units), inserts)} ", tuple(asked))


def copy(rng: random.Random, length: int, questions: int) -> Draft:
    """A passage of random words in prose, to be repeated word for word."""
    # A noun takes one to three tokens: half as many words as an eighth of the length has tokens.
    passage = " ".join(rng.choices(NOUNS, k=max(8, min(length // 16, 500))))
    inserts = [(rng.random(), f"\nThe passage begins here: {passage}. The passage ends here.\n")]
    filler = prose(rng)
    instruction = "A passage of words is hidden within the following text. Memorize it word for word."
    question = Question("Repeat the passage word for word.", "The passage is:", f" {passage}.", (passage,))
    return Draft(lambda units: f"{instruction}\n{scatter(filler.take(units), inserts)}\n", (question,))
