"""Tracing and counting (RULER, arXiv 2404.06654, sections 3.2 and 3.3)."""

import math
import random
import string

from vllm_lrqk.evaluation.tasks.sample import Draft, Question
from vllm_lrqk.evaluation.tasks.words import ADJECTIVES, CODED_WORDS, NOUNS, distinct, listing, prose, scatter


def variable_tracking(rng: random.Random, length: int, questions: int) -> Draft:
    """A chain of assignments in prose; all variables with the first one's value are asked for."""
    hops = 2 if length < 512 else 3 if length < 1024 else 4
    taken: set[str] = set()
    names = [distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), taken) for _ in range(hops + 1)]
    value = str(rng.randrange(10000, 100000))
    assigned = [value, *(f"VAR {name}" for name in names)]
    depths = sorted(rng.random() for _ in names)
    inserts = [(depth, f"VAR {name} = {source}.") for depth, name, source in zip(depths, names, assigned)]
    filler = prose(rng)
    instruction = "Memorize and track the chain of variable assignments hidden in the following text."
    question = Question(
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f"Answer: According to the chain of variable assignment in the text above, {len(names)} variables are assigned "
        f"the value {value}, they are:",
        f" {listing(names)}.",
        tuple(names),
    )
    return Draft(lambda units: f"{instruction}\n{scatter(filler.take(units), inserts)}\n", (question,))


def common_words(rng: random.Random, length: int, questions: int) -> Draft:
    """A numbered list of words; the few that occur ten times as often as the others are asked for."""
    count, often, seldom = (3, 6, 1) if length < 1024 else (5, 15, 2) if length < 4096 else (10, 30, 3)
    words = rng.sample(ADJECTIVES + NOUNS, len(ADJECTIVES + NOUNS))
    common, uncommon = words[:count], words[count:]
    order_seed = rng.random()

    def context(units: int) -> str:
        # Longer lists than there are words: pairs of them, then triples.
        entries = [str(i % count) for i in range(count * often)]
        for unit in range(units):
            parts, number = [uncommon[unit % len(uncommon)]], unit // len(uncommon)
            while number:
                number, digit = divmod(number - 1, len(uncommon))
                parts.append(uncommon[digit])
            entries += ["-".join(parts)] * seldom
        random.Random(order_seed).shuffle(entries)
        name = dict(zip(dict.fromkeys(entry for entry in entries if entry.isdigit()), common))
        listed = " ".join(f"{i}. {name.get(entry, entry)}" for i, entry in enumerate(entries, 1))
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. "
            f"Memorize the ones that appear most often.\n{listed}\n"
        )

    question = Question(
        f"Question: What are the {count} most common words in the above list?",
        f"Answer: The top {count} words that appear most often in the list are:",
        f" {listing(common)}.",
        tuple(common),
    )
    return Draft(context, (question,))


def frequent_words(rng: random.Random, length: int, questions: int) -> Draft:
    """Coded words, the one of rank k with a frequency like 1/k**2; ranks 2 to 4 are asked for, rank 1 is dots."""
    words = ["....", *rng.sample(CODED_WORDS, len(CODED_WORDS))]
    order_seed = rng.random()

    def context(units: int) -> str:
        total = (24 + units) * 6 / math.pi**2
        counts = [round(total / rank**2) for rank in range(1, len(words) + 1)]
        for rank in (3, 2, 1):  # rounding must not make two of the asked ranks equal, nor the last equal to its next
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        text = [word for word, number in zip(words, counts) for _ in range(number)]
        random.Random(order_seed).shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words.\n{' '.join(text)}\n"
        )

    question = Question(
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        f" {listing(words[1:4])}.",
        tuple(words[1:4]),
    )
    return Draft(context, (question,))


def common_vote(rng: random.Random, length: int, questions: int) -> Draft:
    """As `common_words` for small models: votes, half of them for one word, whose sentence is to be gone on with."""
    return _votes(rng, ADJECTIVES + NOUNS)


def frequent_vote(rng: random.Random, length: int, questions: int) -> Draft:
    """As `frequent_words` for small models: votes for coded words."""
    return _votes(rng, CODED_WORDS)


def _votes(rng: random.Random, words: list[str]) -> Draft:
    winner, *others = rng.sample(words, len(words))
    order_seed = rng.random()

    def context(units: int) -> str:
        votes = [winner] * (units + 4) + [others[unit % len(others)] for unit in range(units)]
        random.Random(order_seed).shuffle(votes)
        listed = "\n".join(f"A vote for {word}." for word in votes)
        return f"Below is a list of votes. Memorize the word that has the most votes.\n{listed}\n"

    question = Question("Question: Which word has the most votes?", "Answer: A vote for", f" {winner}.", (winner,))
    return Draft(context, (question,))
