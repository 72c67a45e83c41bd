import pytest

from vllm_lrqk.evaluation import scorers


@pytest.mark.parametrize(
    ("scorer", "output", "answers", "expected"),
    [
        (scorers.all_answers, "12 and 34", ["12", "34", "56"], 2 / 3),
        (scorers.all_answers, "1234", ["12"], 0),
        (scorers.all_answers, "amber-fox", ["fox"], 0),
        (scorers.any_answer, "In Ashford.", ["Millcombe", "Ashford"], 1),
        (scorers.any_answer, "In Ashfordshire.", ["Ashford"], 0),
        (scorers.words_in_order, "one three two four", ["one two three four"], 3 / 4),
        (scorers.words_in_order, "", ["one two"], 0),
        (scorers.token_f1, "The red fox", ["a red fox"], 1),
        (scorers.token_f1, "red fox ran", ["red dog", "fox"], 2 * 1 / (3 + 1)),
        (scorers.token_f1, "", ["fox"], 0),
        (scorers.rouge_l, "fox red", ["red fox"], 2 * 1 / (2 + 2)),
        (scorers.rouge_l, "red quick fox", ["red fox"], 2 * 2 / (3 + 2)),
        (scorers.exact_match, "The Fox!\nand more", ["fox"], 1),
        (scorers.exact_match, "a fox ran", ["fox"], 0),
    ],
)
def test_scores(scorer, output, answers, expected):
    assert scorer(output, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("output", "expected"),
    [("Place", 1), ("Date of birth", 0), ("Place or Date", 1 / 2), ("", 0)],
)
def test_classification(output, expected):
    classes = ["Place", "Date", "Date of birth"]
    assert scorers.classification(output, ["Place"], classes) == expected


def test_a_class_inside_the_right_one_is_not_counted():
    assert scorers.classification("Date of birth", ["Date of birth"], ["Date", "Date of birth"]) == 1


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (' "Ada Abbott": "Ashford", "Boris Becker": "Elmton"}', 1),
        ('{\n  "Boris Becker" : "Elmton",\n  "Ada Abbott":"Oakham"\n}', 1 / 2),
        ('"Ada Abbott": "Elmton", "Boris Becker": "Ashford"', 0),  # right towns of the wrong people
        ('"Ada Abbott": "Oakham", "Ada Abbott": "Ashford"', 0),  # the first value counts
        ("Ada Abbott lives in Ashford", 0),
    ],
)
def test_members_of_an_object(output, expected):
    assert scorers.json_pairs(output, ["Ada Abbott: Ashford", "Boris Becker: Elmton"]) == expected
