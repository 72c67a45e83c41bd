from dataclasses import fields

import pytest

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.methods.lola.settings import LolaSettings

BAD_VALUES = {
    "window": [0, 8, 100, -16, 64.0, "64", True, None],
    "chunk": [0, 8, 100, 64.0, "64", True, None],
    "cache": [-1, 2.5, "236", True, None],
    "sink_tokens": [-1, 0.5, True],
    "state": ["linear", True, None],
    "state_rank": [0, 2, 18, 16.0, True, None],
    "directions": ["", 1, True],
    "select": ["sre", None, 1],
    "feature_maps": ["", 1, True],
    "capture": ["", 1],
    "capture_tokens": [0, 1.5],
}
GOOD_VALUES = {
    "window": [16, 192, 4096],
    "chunk": [16, 64],
    "cache": [4, 10**6],
    "sink_tokens": [0, 236],
    "state": ["slope", "none"],
    "state_rank": [4, 64],
    "directions": [None, "file"],
    "select": ["recall", "random"],
    "feature_maps": [None],
    "capture": [None, "folder"],
    "capture_tokens": [1],
}


def test_every_field_has_cases():
    names = {item.name for item in fields(LolaSettings)}
    assert set(BAD_VALUES) == set(GOOD_VALUES) == names


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in GOOD_VALUES.items() for value in values])
def test_good_values_are_taken(key, value):
    assert getattr(LolaSettings.from_dict({key: value}), key) == value


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD_VALUES.items() for value in values])
def test_bad_values_are_refused_in_one_sentence(key, value):
    with pytest.raises(ConfigError) as caught:
        LolaSettings.from_dict({key: value})
    message = str(caught.value)
    assert message.startswith((f"lola.{key} is {value!r}, but ", f"lola.{key} is {value}, but "))
    assert "must be" in message
    assert message.endswith(".")
    assert "\n" not in message
    assert ". " not in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 100}, "lola.window is 100, but must be a multiple of 16."),
        ({"select": "sre"}, "lola.select is 'sre', but must be one of recall, random."),
        (
            {"cache": 2},
            "lola.cache is 2, but must hold the 4 sink_tokens: set it to 4 or more, or sink_tokens to 2.",
        ),
        (
            {"state": "hedgehog"},
            'lola.feature_maps is null, but lola.state is "hedgehog": name the file of the feature maps, '
            'or set state to "slope".',
        ),
        (
            {"feature_maps": "maps.safetensors"},
            "lola.feature_maps is 'maps.safetensors', but lola.state is 'slope': set state to \"hedgehog\", "
            "or feature_maps to null.",
        ),
        (
            {"state": "none", "directions": "file"},
            "lola.directions is 'file', but lola.state is 'none': set state to \"slope\", or directions to null.",
        ),
        ({"windows": 5}, "lola.windows is not a setting of vllm-lrqk; did you mean window?"),
    ],
)
def test_messages(values, message):
    with pytest.raises(ConfigError) as caught:
        LolaSettings.from_dict(values)
    assert str(caught.value) == message


def test_counts_at_the_defaults():
    """The first chunk leaves with token 257; 236 rows are cached from the fourth chunk on."""
    settings = LolaSettings()
    assert [settings.updates(seen) for seen in (0, 1, 256, 257, 320, 321, 4096)] == [0, 0, 0, 1, 1, 2, 60]
    assert [settings.cached(updates) for updates in (0, 1, 3, 4, 60)] == [0, 64, 192, 236, 236]
    assert [settings.folded(updates) for updates in (0, 3, 4, 60)] == [0, 0, 20, 3604]
