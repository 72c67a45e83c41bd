"""Long-context tasks of any length and for any tokenizer, generated on the spot and the same for the same seed."""

import random

from vllm_lrqk.evaluation.scorers import all_answers, any_answer, words_in_order
from vllm_lrqk.evaluation.tasks import aggregation, documents, retrieval
from vllm_lrqk.evaluation.tasks.sample import CountTokens, Question, Sample, Task, fit

MINIMUM_LENGTH = 256

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("niah_single", "one number in prose", retrieval.single, all_answers, turns=True),
        Task("niah_multikey", "one number among many", retrieval.multikey, all_answers, turns=True),
        Task("niah_multivalue", "all numbers of one key", retrieval.multivalue, all_answers),
        Task("niah_multiquery", "the numbers of several keys", retrieval.multiquery, all_answers),
        Task("variable_tracking", "a chain of assignments", aggregation.variable_tracking, all_answers),
        Task("common_words", "the words that occur most often in a list", aggregation.common_words, all_answers),
        Task("frequent_words", "the most frequent coded words", aggregation.frequent_words, all_answers),
        Task("qa", "a fact of one document", documents.questions_over_documents, any_answer, turns=True),
        Task("copy", "a passage word for word", retrieval.copy, words_in_order),
        Task(
            "needle", "the rest of a sentence of words", retrieval.needle, words_in_order, turns=True, instructs=False
        ),
        Task("passage", "the rest of a long sentence of words", retrieval.passage, words_in_order, instructs=False),
    )
}


def make_sample(task: str, length: int, count_tokens: CountTokens, seed: int) -> Sample:
    """One prompt of `task` with close to `length` tokens, never more, with what may be generated after it.

    `count_tokens` gives the number of tokens of a text. Raises ValueError for an unknown task and for a length
    that cannot hold the task.
    """
    return make_conversation(task, length, count_tokens, seed, turns=1)[0]


def make_conversation(task: str, length: int, count_tokens: CountTokens, seed: int, turns: int) -> list[Sample]:
    """As `make_sample`, with `turns` questions about one text; the last prompt reaches `length`.

    Each prompt is the one before, its completion and the next question.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is unknown; choose from {', '.join(TASKS)}.")
    if length < MINIMUM_LENGTH:
        raise ValueError(f"length: {length} tokens are too few for {task}; use {MINIMUM_LENGTH} or more.")
    chosen = TASKS[task]
    if turns > 1 and not chosen.turns:
        others = ", ".join(name for name in TASKS if TASKS[name].turns)
        raise ValueError(f"task: {task} has one question per text; for several turns use {others}.")
    draft = chosen.draft(random.Random(f"{task} {length} {seed}"), length, turns)
    asked = _dialogue(draft.questions)
    room = length - draft.questions[-1].max_tokens(count_tokens)
    try:
        prompt = fit(lambda units: draft.context(units) + asked[-1], room, count_tokens)
    except ValueError as error:
        message = f"length: {length} is {error} for {task} with this tokenizer; use a longer one."
        raise ValueError(message) from error
    context = prompt.removesuffix(asked[-1])
    return [
        Sample(
            prompt=context + said,
            question=question.text,
            completion=question.completion,
            answers=question.answers,
            max_tokens=question.max_tokens(count_tokens),
            scorer=chosen.scorer,
        )
        for said, question in zip(asked, draft.questions)
    ]


def _dialogue(questions: tuple[Question, ...]) -> list[str]:
    said, texts = "", []
    for question in questions:
        texts.append(said + question.text)
        said += f"{question.text}{question.completion}\n"
    return texts
