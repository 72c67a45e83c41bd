"""The attention backend of each method, as vLLM sees it: `LRQKBackend` and so on, made when asked for."""

from functools import cache
from typing import Any, ClassVar

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.integration.backend_base import BackendBase
from vllm_lrqk.integration.blocks import PageSpec, RequestSpec, page_spec, request_spec
from vllm_lrqk.integration.settings import Engine
from vllm_lrqk.methods import METHODS

_SUFFIX = "Backend"


class MethodBackend(BackendBase):
    """Base of the methods' backends."""

    method: ClassVar[str]
    """Key of `METHODS`."""

    @classmethod
    def get_name(cls) -> str:
        return cls.method

    @classmethod
    def get_impl_cls(cls) -> type:
        from vllm_lrqk.integration.impl import impl_class

        return impl_class(cls.method)

    @staticmethod
    def get_builder_cls() -> type:
        from vllm_lrqk.integration.metadata import StepBuilder

        return StepBuilder


@cache
def backend_class(method: str) -> type[MethodBackend]:
    """The backend of one method."""
    return _derived(MethodBackend, method + _SUFFIX, method=method)


def backend_of(engine: Engine) -> type[MethodBackend]:
    """The backend of one engine's layers: it knows what they need, which vLLM asks outside of any configuration."""

    def customize_spec(cls: Any, spec: AttentionSpec) -> AttentionSpec:
        if isinstance(spec, PageSpec | RequestSpec):
            return spec
        if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
            raise ConfigError(
                f"{cls.method} serves full attention with equal key and value sizes, this layer has {spec}."
            )
        plan = engine.method.plan(spec.head_size, spec.dtype)
        make = page_spec if plan.is_paged else request_spec
        return make(plan, spec.num_kv_heads, spec.head_size, engine.num_host_pages)

    base = backend_class(engine.method.name)
    return _derived(base, base.__qualname__, customize_spec=classmethod(customize_spec))


def _derived(base: type[MethodBackend], name: str, **members: Any) -> type[MethodBackend]:
    return type(name, (base,), {"__module__": __name__, "__qualname__": name, **members})


def __getattr__(name: str) -> type[MethodBackend]:
    method = name.removesuffix(_SUFFIX)
    if method == name or method not in METHODS:
        raise AttributeError(name)
    return backend_class(method)
