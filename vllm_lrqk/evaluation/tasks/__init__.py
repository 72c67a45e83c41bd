"""Long-context tasks of any length and for any tokenizer, generated on the spot and the same for the same seed."""

import random
from collections.abc import Sequence

from vllm_lrqk.evaluation.scorers import all_answers, any_answer, first_answer, json_pairs, words_in_order
from vllm_lrqk.evaluation.tasks import aggregation, documents, retrieval
from vllm_lrqk.evaluation.tasks.sample import CountTokens, Question, Render, Sample, Task, fit, plain

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
        Task("common_vote", "the word with half of the votes", aggregation.common_vote, first_answer),
        Task("frequent_vote", "the coded word with half of the votes", aggregation.frequent_vote, first_answer),
        Task("qa", "a fact of one document", documents.questions_over_documents, any_answer, turns=True),
        Task("text_to_json", "many facts of the text in one answer", documents.text_to_json, json_pairs),
        Task("copy", "a passage word for word", retrieval.copy, words_in_order),
        Task(
            "needle", "the rest of a sentence of words", retrieval.needle, words_in_order, turns=True, instructs=False
        ),
        Task("passage", "the rest of a long sentence of words", retrieval.passage, words_in_order, instructs=False),
    )
}


def make_sample(task: str, length: int, count_tokens: CountTokens, seed: int, render: Render = plain) -> Sample:
    """One prompt of `task` with close to `length` tokens, never more, with what may be generated after it.

    `count_tokens` gives the number of tokens of a text, `render` makes a prompt of a dialogue. Raises ValueError for an
    unknown task and for a length that cannot hold the task.
    """
    return make_conversation(task, length, count_tokens, seed, 1, render)[0]


def make_conversation(
    task: str, length: int, count_tokens: CountTokens, seed: int, turns: int, render: Render = plain
) -> list[Sample]:
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
    room = length - draft.questions[-1].max_tokens(count_tokens)

    def context(units: int) -> str:
        return _prompt(draft.context(units), draft.questions, render)

    try:
        units = fit(context, room, count_tokens)
    except ValueError as error:
        message = f"length: {length} is {error} for {task} with this tokenizer; use a longer one."
        raise ValueError(message) from error
    text, samples = draft.context(units), []
    for number, question in enumerate(draft.questions, 1):
        prompt = _prompt(text, draft.questions[:number], render)
        samples.append(
            Sample(
                prompt=prompt,
                question=prompt[prompt.rindex(question.text) :],
                completion=question.completion,
                answers=question.answers,
                max_tokens=question.max_tokens(count_tokens),
                scorer=chosen.scorer,
            )
        )
    return samples


def _prompt(text: str, questions: Sequence[Question], render: Render) -> str:
    """The text and the questions with their right answers, of the last question how its answer begins."""
    said = [text + questions[0].text, *(question.text for question in questions[1:])]
    answers = [question.begins + question.completion for question in questions[:-1]] + [questions[-1].begins]
    return render(list(zip(said, answers)))
