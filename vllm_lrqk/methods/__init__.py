"""The methods: one line each, imported when an engine chooses it."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every process of vLLM loads the plugin: names alone must cost nothing
    from vllm_lrqk.core.method import Method

METHODS = {
    "AQUA": "vllm_lrqk.methods.aqua.method:Aqua",
    "LOLA": "vllm_lrqk.methods.lola.method:Lola",
    "LRQK": "vllm_lrqk.methods.lrqk.method:LRQK",
}
"""Backend name and class of each method."""


def method_class(name: str) -> "type[Method]":
    """The class of the method with this backend name."""
    module, _, attribute = METHODS[name].partition(":")
    return getattr(import_module(module), attribute)
