"""The configuration of an engine, and what its refusal says, without loading anything."""

from vllm.engine.arg_utils import EngineArgs


def start(model, lrqk=None, **settings):
    """Build the engine's configuration as `LLM` and `vllm serve` do, without loading anything."""
    arguments = {"skip_tokenizer_init": True, "max_model_len": 2048, "dtype": "float32"}
    arguments |= {"attention_backend": "LRQK", "additional_config": {"lrqk": lrqk or {}}} | settings
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def sentence(error):
    """The message that a user sees, out of the wrapping that pydantic adds."""
    text = str(error.value)
    return text.split("Value error, ", 1)[-1].split(" [type=value_error", 1)[0].strip()
