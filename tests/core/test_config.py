from dataclasses import FrozenInstanceError, fields

import pytest

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

BAD_VALUES = {
    "rank": [3, 0, 18, 16.0, "16", True, None],
    "page_size": [100, 8, 2048, "256", True],
    "top_k": [0, -1, 2.5, True],
    "top_p": [0, -0.5, 1.01, 2, float("nan"), "0.9", True, None],
    "recent_tokens": [0, "64"],
    "sink_tokens": [-1, 0.5],
    "residual": ["median", True, None],
    "value_rank": [0, 2, 6, 8.0, True],
    "factorization": ["svd", 1],
    "calibration": ["", 1, True],
    "value_map": ["request", None],
    "factor_dtype": ["int4", None],
    "iterations": [0, 1.5],
    "lambda_q": [0, -1.0, float("nan"), float("inf"), "1", True],
    "lambda_k": [0, -1.0, float("nan"), float("inf"), "1", True],
    "hot_cache": ["on", 1, None],
    "hot_rows": [0, 10, 1.5, True],
    "capture": ["", 1, True],
    "capture_tokens": [0, 1.5, True, None],
    "host_memory_gib": [0, -4, float("nan"), float("inf"), "8", True],
}
GOOD_VALUES = {
    "rank": [4, 64],
    "page_size": [16, 1024],
    "top_k": [1, 10**6],
    "top_p": [1, 1.0, 0.9, 1e-6],
    "recent_tokens": [1],
    "sink_tokens": [0],
    "value_rank": [4, 8, 64, None],
    "residual": ["linear", "mean", "none"],
    "factorization": ["lrqk", "key_pca", "calibrated"],
    "calibration": [None, "file"],
    "value_map": ["page", "calibrated"],
    "factor_dtype": ["int8", "bfloat16"],
    "iterations": [1],
    "lambda_q": [1, 0.5],
    "lambda_k": [1, 0.5],
    "hot_cache": ["auto", True, False],
    "hot_rows": [None, 2048 + 64 + 4 + 256],
    "capture": [None, "folder"],
    "capture_tokens": [1],
    "host_memory_gib": [None, 1, 0.5],
}


def test_every_field_has_cases():
    names = {item.name for item in fields(LRQKSettings)}
    assert set(BAD_VALUES) == set(GOOD_VALUES) == names


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD_VALUES.items() for value in values])
def test_good_values_are_taken(key, value):
    assert getattr(LRQKSettings.from_dict({key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_in_one_sentence(key, value):
    with pytest.raises(ConfigError) as caught:
        LRQKSettings.from_dict({key: value})
    message = str(caught.value)
    assert message.startswith((f"lrqk.{key} is {value!r}, but ", f"lrqk.{key} is {value}, but "))
    assert "must be" in message or "set it to" in message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 18}, "lrqk.rank is 18, but must be a multiple of 4."),
        ({"rank": True}, "lrqk.rank is True, but must be a whole number."),
        ({"top_k": 0}, "lrqk.top_k is 0, but must be 1 or more."),
        ({"top_p": 1.5}, "lrqk.top_p is 1.5, but must be 1 or less."),
        ({"top_p": 0.0}, "lrqk.top_p is 0.0, but must be above 0."),
        ({"lambda_q": 0}, "lrqk.lambda_q is 0, but must be above 0."),
        ({"lambda_k": float("inf")}, "lrqk.lambda_k is inf, but must be finite."),
        ({"residual": "max"}, "lrqk.residual is 'max', but must be one of linear, mean, none."),
        (
            {"hot_rows": 10},
            "lrqk.hot_rows is 10, but one step can attend 2372 rows (top_k + recent_tokens + sink_tokens + "
            "page_size): set it to 2372 or more.",
        ),
        ({"topk": 5}, "lrqk.topk is not a setting of vllm-lrqk; did you mean top_k?"),
    ],
)
def test_messages(values, message):
    with pytest.raises(ConfigError) as caught:
        LRQKSettings.from_dict(values)
    assert str(caught.value) == message


def test_unknown_key_without_a_near_one_lists_all():
    with pytest.raises(ConfigError) as caught:
        LRQKSettings.from_dict({"zzz": 5})
    assert all(item.name in str(caught.value) for item in fields(LRQKSettings))


@pytest.mark.parametrize("values", [None, [], "rank=16", 5])
def test_not_a_dictionary(values):
    with pytest.raises(ConfigError, match=r"^lrqk is .*, but must be a dictionary of settings\.$"):
        LRQKSettings.from_dict(values)


def test_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        LRQKSettings().rank = 8


def test_attended_and_hot_rows():
    config = LRQKSettings(top_k=100, recent_tokens=10, sink_tokens=2, page_size=16)
    assert config.attended_rows == 128
    assert config.num_hot_rows == 160
    assert LRQKSettings(top_k=100, recent_tokens=10, sink_tokens=2, page_size=16, hot_rows=128).num_hot_rows == 128


def test_columns_of_the_values():
    assert LRQKSettings(rank=32).num_value_ranks == 32
    assert LRQKSettings(rank=32, value_rank=8).num_value_ranks == 8
    assert LRQKSettings(rank=8, value_rank=16).num_value_ranks == 8
    assert LRQKSettings(residual="mean").num_value_ranks == LRQKSettings(residual="none").num_value_ranks == 0
