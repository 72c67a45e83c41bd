import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_lrqk.evaluation.tasks import TASKS, make_conversation, make_sample
from vllm_lrqk.evaluation.tasks.sample import MAX_COUNTS


def count_pieces(text: str) -> int:
    """Tokens of a tokenizer with pieces of up to four letters."""
    return len(re.findall(r"\w{1,4}|[^\w\s]", text))


def count_words(text: str) -> int:
    return len(text.split())


cases = {
    "task": st.sampled_from(sorted(TASKS)),
    "length": st.integers(256, 4096),
    "seed": st.integers(0, 1 << 30),
    "count_tokens": st.sampled_from([count_pieces, count_words]),
}


@given(**cases)
@settings(deadline=None)
def test_a_sample_fills_its_length(task, length, seed, count_tokens):
    sample = make_sample(task, length, count_tokens, seed)
    used = count_tokens(sample.prompt) + sample.max_tokens
    assert length - max(70, 0.03 * length) <= used <= length  # a unit of filler has up to 60 tokens
    assert count_tokens(sample.completion) <= sample.max_tokens


@given(**cases)
@settings(deadline=None)
def test_the_answers_are_in_the_text(task, length, seed, count_tokens):
    sample = make_sample(task, length, count_tokens, seed)
    assert sample.answers
    for answer in sample.answers:
        for part in answer.split(": "):  # a JSON member
            assert re.search(rf"\b{part}\b", sample.prompt)
    assert sample.completion.startswith(" ") and sample.completion.endswith(".")
    assert sample.score(sample.completion) == 1
    assert sample.score(" Nobody ever told me.") == 0


@given(**cases)
@settings(deadline=None)
def test_samples_depend_on_the_seed_alone(task, length, seed, count_tokens):
    sample = make_sample(task, length, count_tokens, seed)
    assert sample == make_sample(task, length, count_tokens, seed)
    assert sample.prompt != make_sample(task, length, count_tokens, seed + 1).prompt


def test_few_texts_are_tokenised():
    texts = []

    def count(text):
        texts.append(text)
        return count_pieces(text)

    for task in TASKS:
        texts.clear()
        make_sample(task, 4096, count, 0)
        assert sum(len(text) > 1000 for text in texts) <= MAX_COUNTS


@given(seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_other_answers_score_less(seed):
    """A scorer that accepts any output of the right form would not notice anything."""
    for task in TASKS:
        sample, other = (make_sample(task, 1024, count_words, s) for s in (seed, seed + 1))
        if set(sample.answers) != set(other.answers):
            assert sample.score(other.completion) < 1


def test_common_words_are_the_most_common():
    for length in (256, 1024, 8192):
        sample = make_sample("common_words", length, count_pieces, 0)
        words = re.findall(r"\d+\. ([\w-]+)", sample.prompt)
        often = {answer: words.count(answer) for answer in sample.answers}
        others = max(words.count(word) for word in set(words) - set(often))
        assert min(often.values()) >= 5 * others


@given(length=st.integers(256, 8192), seed=st.integers(0, 1000))
@settings(deadline=None)
def test_frequent_words_have_one_order(length, seed):
    sample = make_sample("frequent_words", length, count_pieces, seed)
    words = sample.prompt.split("\n")[1].split()
    counts = {word: words.count(word) for word in set(words) - {"...."}}
    best = sorted(counts, key=lambda word: -counts[word])
    assert tuple(best[:3]) == sample.answers
    first, second, third, fourth = (counts[word] for word in best[:4])
    assert first > second > third > fourth


def test_a_question_about_documents_has_one_document():
    for seed in range(20):
        sample = make_sample("qa", 2048, count_pieces, seed)
        question = sample.prompt.split("Question: ")[1]
        name = " ".join(re.findall(r"\b[A-Z]\w+", question)[1:3])
        assert len(re.findall(rf"Document: {name} ", sample.prompt)) == 1


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.turns])
def test_turns_extend_one_text(task):
    turns = make_conversation(task, 2048, count_pieces, 3, turns=4)
    for before, after in itertools.pairwise(turns):
        assert after.prompt.startswith(before.prompt + before.completion)
    assert len({turn.answers for turn in turns}) == 4
    assert count_pieces(turns[-1].prompt) + turns[-1].max_tokens <= 2048


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("riddle", 512, count_words, 0, 1), "task: 'riddle' is unknown"),
        (("qa", 255, count_words, 0, 1), "length: 255 tokens are too few"),
        (("copy", 512, count_words, 0, 2), "task: copy has one question per text"),
        (("qa", 256, len, 0, 1), "tokens too short for qa with this tokenizer; use a longer one."),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_conversation(*arguments)
