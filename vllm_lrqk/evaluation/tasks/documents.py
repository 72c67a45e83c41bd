"""Questions over short documents (the form of RULER's QA, arXiv 2404.06654, section 3.4), and all facts of a text."""

import random

from vllm_lrqk.evaluation.tasks.sample import Draft, Question
from vllm_lrqk.evaluation.tasks.words import (
    FIRST_NAMES,
    INSTRUMENTS,
    LAST_NAMES,
    OCCUPATIONS,
    TOWN_BEGINNINGS,
    TOWN_ENDINGS,
    Stream,
    distinct,
    listing,
    prose,
    scatter,
)

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


class _People:
    """Documents about people whose names occur once."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names: set[str] = set()

    def name(self) -> str:
        choice = self._rng.choice
        # Two last names where the text is so long that there are more people than names.
        many = len(self._names) >= len(FIRST_NAMES) * len(LAST_NAMES) // 2
        parts = [FIRST_NAMES, LAST_NAMES, *[LAST_NAMES] * many]
        return distinct(lambda: " ".join(map(choice, parts)), self._names)

    def town(self) -> str:
        return self._rng.choice(TOWN_BEGINNINGS) + self._rng.choice(TOWN_ENDINGS)

    def document(self) -> tuple[str, list[tuple[str, str]]]:
        """A document and the questions and answers about it."""
        choice = self._rng.choice
        name, town = self.name(), self.town()
        occupation, instrument = choice(OCCUPATIONS), choice(INSTRUMENTS)
        facts = [
            (f"{name} lives in {town}.", f"Where does {name} live?", town),
            (f"{name} works as a {occupation}.", f"What is the occupation of {name}?", occupation),
            (f"{name} plays the {instrument}.", f"What instrument does {name} play?", instrument),
        ]
        self._rng.shuffle(facts)
        text = " ".join(sentence for sentence, _, _ in facts)
        return f"Document: {text}", [(question, answer) for _, question, answer in facts]


def questions_over_documents(rng: random.Random, length: int, questions: int) -> Draft:
    """Each question asks for one fact of one document; the other documents have facts of the same kind."""
    people = _People(rng)
    asked = [people.document() for _ in range(questions)]
    inserts = [(rng.random(), text) for text, _ in asked]
    others = Stream(lambda: people.document()[0])
    chosen = [rng.choice(facts) for _, facts in asked]

    def context(units: int) -> str:
        documents = scatter(others.take(units), inserts, "\n")
        return f"{INSTRUCTION}\n\nThe following are given documents.\n\n{documents}\n\n{INSTRUCTION}\n\n"

    posed = [Question(f"Question: {text}", "Answer:", f" {answer}.", (answer,)) for text, answer in chosen]
    return Draft(context, tuple(posed))


def text_to_json(rng: random.Random, length: int, questions: int) -> Draft:
    """Facts about several people in prose, all to be written down in one answer, of which the first is given.

    The form of Text2JSON (arXiv 2604.08426): one answer depends on many places of the context.
    """
    people = _People(rng)
    towns = {people.name(): people.town() for _ in range(4 if length < 1024 else 8)}
    inserts = [(rng.random(), f"{name} lives in {town}.") for name, town in towns.items()]
    filler = prose(rng)
    instruction = "The following text says where some people live. Memorize the town of each of them."
    members = [f'"{name}": "{town}"' for name, town in towns.items()]
    question = Question(
        f"Question: Where do {listing(list(towns))} live? Answer with a JSON object of their names and towns.",
        f"Answer: {{{members[0]},",
        f" {', '.join(members[1:])}}}.",
        tuple(f"{name}: {town}" for name, town in towns.items())[1:],
    )
    return Draft(lambda units: f"{instruction}\n{scatter(filler.take(units), inserts)}\n", (question,))
