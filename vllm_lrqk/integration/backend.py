"""The attention backend of each method, as vLLM sees it: `LRQKBackend` and so on, made when asked for."""

from functools import cache
from typing import Any, ClassVar

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.integration.backend_base import BackendBase
from vllm_lrqk.integration.blocks import PageSpec, RequestSpec, page_spec, request_spec
from vllm_lrqk.integration.metrics import Series
from vllm_lrqk.integration.settings import Engine
from vllm_lrqk.methods import METHODS

_SUFFIX = "Backend"


class MethodBackend(BackendBase):
    """Base of the methods' backends."""

    method: ClassVar[str]
    """Key of `METHODS`."""
    engine: ClassVar[Engine]
    """Of the layers, in a class that `bound_to` made."""
    series: ClassVar[Series | None]
    """What the scheduler writes for `/metrics`; as `engine`."""

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

    @classmethod
    @cache
    def bound_to(cls, engine: Engine, series: Series | None) -> "type[MethodBackend]":
        """This backend for one engine: it knows what layers need, which vLLM asks outside of any configuration."""
        return _derived(cls, cls.__qualname__, engine=engine, series=series)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if isinstance(spec, PageSpec | RequestSpec):
            return spec
        if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
            raise ConfigError(
                f"{cls.method} serves full attention with equal key and value sizes, this layer has {spec}."
            )
        plan = cls.engine.method.plan(spec.head_size, spec.dtype, cls.engine.group)
        shape = plan, spec.num_kv_heads, spec.head_size
        if not plan.is_paged:
            return request_spec(*shape, cls.engine.first_spare_block)
        return page_spec(*shape, cls.engine.num_host_pages, cls.series)


@cache
def backend_class(method: str) -> type[MethodBackend]:
    """The backend of one method."""
    return _derived(MethodBackend, method + _SUFFIX, method=method)


def _derived(base: type[MethodBackend], name: str, **members: Any) -> type[MethodBackend]:
    return type(name, (base,), {"__module__": __name__, "__qualname__": name, **members})


def __getattr__(name: str) -> type[MethodBackend]:
    method = name.removesuffix(_SUFFIX)
    if method == name or method not in METHODS:
        raise AttributeError(name)
    return backend_class(method)
