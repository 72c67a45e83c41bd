import pytest

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.methods.aqua.settings import AquaSettings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"keep": 0}, "aqua.keep is 0, but must be above 0."),
        ({"keep": 1.5}, "aqua.keep is 1.5, but must be 1 or less."),
        ({"keep": True}, "aqua.keep is True, but must be a number."),
        ({"stored": -0.5}, "aqua.stored is -0.5, but must be above 0."),
        ({"choose": "group"}, "aqua.choose is 'group', but must be one of kv_head, query_head."),
        ({"key_dtype": "int4"}, "aqua.key_dtype is 'int4', but must be one of auto, int8."),
        ({"calibration": ""}, "aqua.calibration is '', but must be null or not empty."),
        ({"kept": 0.5}, "aqua.kept is not a setting of vllm-lrqk; did you mean keep?"),
    ],
)
def test_bad_values_get_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as caught:
        AquaSettings.from_dict(values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("keep", "stored", "head_size", "kept_of_stored"),
    [
        (0.75, 1.0, 128, (96, 128)),
        (1.0, 0.75, 128, (96, 96)),
        (0.75, 0.75, 64, (36, 48)),
        (0.5, 0.7, 80, (28, 56)),
        (0.001, 0.001, 64, (1, 4)),
        (1.0, 1.0, 16, (16, 16)),
    ],
)
def test_shares_become_dimensions(keep, stored, head_size, kept_of_stored):
    config = AquaSettings(keep=keep, stored=stored)
    assert (config.num_kept(head_size), config.num_stored(head_size)) == kept_of_stored
