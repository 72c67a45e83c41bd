"""Entry point `vllm.general_plugins`: makes vLLM know the methods' names, and nothing else.

vLLM calls it in every process, possibly several times; an exception here would stop engines that use no method of ours.
"""

from vllm_lrqk import names
from vllm_lrqk.integration import compat
from vllm_lrqk.methods import METHODS


def register() -> None:
    """Register the backends and the two hooks that act only where one of them is chosen."""
    version = compat.vllm_version()
    if version is not None and version < compat.MINIMUM_VLLM:
        needed = ".".join(map(str, compat.MINIMUM_VLLM))
        compat.logger("lrqk").warning(
            "vllm-lrqk needs vLLM %s or later and is not available in %s.", needed, ".".join(map(str, version))
        )
        return
    for method in METHODS:
        compat.register_backend(method, names.backend_path(method))
    compat.register_backend(names.REQUEST_BACKEND, "vllm_lrqk.integration.request_blocks.RequestBackend")
    compat.register_backend(names.WINDOW_BACKEND, names.WINDOW_BACKEND_PATH)
    compat.wrap_check_and_update_config(_after_platform_check)
    compat.wrap_cpu_backend_selection(METHODS, _select_on_cpu)


def _after_platform_check(vllm_config: object) -> None:
    from vllm_lrqk.integration.startup import prepare

    prepare(vllm_config)


def _select_on_cpu(backend: object, selector_config: object) -> str:
    from vllm_lrqk.integration.startup import select_backend

    return select_backend(backend, selector_config)
