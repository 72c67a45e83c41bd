"""LRQK as a method: what it refuses, the memory it needs, and its layers on each device."""

from functools import partial
from typing import Any, ClassVar

import torch

from vllm_lrqk import devices
from vllm_lrqk.core.calibration import CalibrationSource, ModelIdentity
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.hot_rows import HotCache, HotFormat
from vllm_lrqk.core.layer import LayerMemory, LayerPlace, LayerShape
from vllm_lrqk.core.method import MemoryPlan, Method, ModelFacts, StepTraffic
from vllm_lrqk.devices import cuda_library
from vllm_lrqk.methods.lrqk.calibrated_basis import make_basis
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedFormat, CalibratedPages
from vllm_lrqk.methods.lrqk.calibrated_layer import CalibratedLayer, check_calibration
from vllm_lrqk.methods.lrqk.cpu_decoders import TALLIES, HotDecoder, InPlaceDecoder
from vllm_lrqk.methods.lrqk.cuda_select import MAX_HEAD_SIZE, MAX_RANK, MAX_TOKENS, check_config
from vllm_lrqk.methods.lrqk.dispatch import host_kernels
from vllm_lrqk.methods.lrqk.format import FactorPages, PageFormat
from vllm_lrqk.methods.lrqk.layer import Decoder, LRQKLayer
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


class LRQK(Method):
    """Low-rank factors score all tokens; rows of the best ones come from CPU memory."""

    name = "LRQK"
    settings_type = LRQKSettings
    block_size_setting = "lrqk.page_size"
    serves_windows = True
    serves_drafts = True
    serves_caps_and_sinks = True
    tallies: ClassVar[tuple[str, ...]] = TALLIES
    settings: LRQKSettings

    @property
    def variant(self) -> str:
        return f"{self.settings.factorization} factors"

    @property
    def host_memory_gib(self) -> float | None:
        return self.settings.host_memory_gib

    @property
    def uses_hot_cache(self) -> bool:
        """Whether requests own hot blocks: "auto" means where host and device memory differ."""
        return self.device_type != "cpu" if self.settings.hot_cache == "auto" else bool(self.settings.hot_cache)

    def hot_format(self, head_size: int, dtype: torch.dtype) -> HotFormat:
        """The format of a hot block: as many bytes per KV head as a factor page."""
        return HotFormat(self.page_format(head_size).page_bytes, head_size, dtype)

    def page_format(self, head_size: int) -> PageFormat | CalibratedFormat:
        """The format of a factor page."""
        kind = CalibratedFormat if self.settings.is_calibrated else PageFormat
        return kind.from_config(self.settings, head_size)

    def check(self, model: ModelFacts) -> None:
        config = self.settings
        if config.rank > model.head_size:
            raise ConfigError(
                f"lrqk.rank is {config.rank}, but must be at most the head size of {model.name}, {model.head_size}."
            )
        if config.is_calibrated:
            if self.device_type != "cpu":
                raise ConfigError('lrqk.factorization is "calibrated", which runs on the CPU only: set it to "lrqk".')
            self._calibration = CalibrationSource("lrqk.calibration", config.calibration, ModelIdentity.of(model))
            check_calibration(self._calibration.open(), config, model)
        if self.device_type != "cpu":
            check_config(config)
            self._check_cuda(model)

    def check_machine(self) -> None:
        if self.device_type == "cpu":
            return
        try:
            cuda_library.load()
        except RuntimeError as error:
            raise ConfigError(str(error)) from error

    def traffic(self, plan: MemoryPlan, length: int, head_size: int, dtype: torch.dtype) -> StepTraffic:
        rows = min(length, self.settings.attended_rows) * 2 * head_size * dtype.itemsize
        return StepTraffic(length * plan.bytes_per_token + rows, rows if self.uses_hot_cache else 0)

    def _check_cuda(self, model: ModelFacts) -> None:
        config = self.settings
        if config.hot_cache is False:
            raise ConfigError('lrqk.hot_cache is false, but a GPU needs the hot cache: set it to "auto".')
        if config.rank > MAX_RANK:
            raise ConfigError(f"lrqk.rank is {config.rank}, but the CUDA kernels serve up to {MAX_RANK}: lower it.")
        if model.head_size > MAX_HEAD_SIZE or model.head_size % 8:
            raise ConfigError(
                f"LRQK on a GPU needs a head size that is a multiple of 8 and at most {MAX_HEAD_SIZE}, and that of "
                f"{model.name} is {model.head_size}: serve it with another attention backend."
            )
        if model.max_model_len + config.page_size > MAX_TOKENS:
            raise ConfigError(
                f"--max-model-len is {model.max_model_len}, but LRQK on a GPU serves "
                f"{MAX_TOKENS - config.page_size} tokens at most: lower it."
            )

    def plan(self, head_size: int, dtype: torch.dtype, group: int) -> MemoryPlan:
        config = self.settings
        hot_blocks = 0
        if self.uses_hot_cache:  # where it is off, pages may be too small for a row
            hot_blocks = self.hot_format(head_size, dtype).blocks_for(config.num_hot_rows)
        return MemoryPlan(
            block_size=config.page_size,
            bytes_per_token=self.page_format(head_size).bytes_per_token,
            is_paged=True,
            blocks_per_request=hot_blocks,
            host_bytes_per_token=2 * head_size * dtype.itemsize,
        )

    def make_workspace(self, shape: LayerShape, max_requests: int, max_model_len: int, device: torch.device) -> Any:
        operators = devices.cuda_operators(device)
        if operators is None:
            return None
        from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath, requests_at_once

        config, heads = self.settings, (shape.heads, shape.kv_heads)
        form = self.hot_format(shape.head_size, shape.torch_dtype)
        hot_blocks = form.blocks_for(config.num_hot_rows)
        max_pages = -(-max_model_len // config.page_size)
        hot_slots = hot_blocks * form.rows_per_block
        at_once = requests_at_once(operators, max_requests, max_pages, *heads, hot_slots, config)
        return DecodePath(operators, at_once, max_pages, *heads, form, hot_blocks, config, device)

    def make_layer(
        self,
        shape: LayerShape,
        place: LayerPlace,
        memory: LayerMemory,
        workspace: Any,
        counters: Counters,
        tallies: torch.Tensor,
        device: torch.device,
    ) -> LRQKLayer:
        assert memory.blocks is not None
        assert memory.host is not None
        factors, kind = self._factors(memory.blocks, place, shape), LRQKLayer
        if self.settings.is_calibrated:
            kind = CalibratedLayer
        layer = partial(kind, factors, memory.host, scale=shape.scale, config=self.settings, counters=counters)
        hot_format = self.hot_format(shape.head_size, shape.torch_dtype)
        operators = devices.cuda_operators(device)
        if operators is not None:
            from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
            from vllm_lrqk.methods.lrqk import cuda
            from vllm_lrqk.methods.lrqk.cuda_decoder import CudaDecoder

            assert memory.request_blocks is not None
            assert isinstance(factors, FactorPages)
            hot = DeviceHotCache(operators, memory.request_blocks, hot_format, len(memory.host), tallies[:2])
            decoder: Decoder = CudaDecoder(factors, memory.host, hot, workspace, shape.scale)
            return layer(decoder=decoder, kernels=cuda.kernels(operators))
        kernels = host_kernels()
        rest = (kernels, shape.scale, self.settings, tallies)
        if memory.request_blocks is None:
            decoder = InPlaceDecoder(factors, memory.host, *rest)
        else:
            hot_rows = HotCache(memory.request_blocks, hot_format, len(memory.host))
            decoder = HotDecoder(factors, memory.host, hot_rows, *rest)
        return layer(decoder=decoder, kernels=kernels)

    def _factors(self, blocks: torch.Tensor, place: LayerPlace, shape: LayerShape) -> FactorPages | CalibratedPages:
        form = self.page_format(shape.head_size)
        if isinstance(form, PageFormat):
            return FactorPages(blocks, form)
        file = self._calibration.open()
        assert file.frames is not None
        basis = make_basis(file.moments(place, shape.kv_heads), form.rank, file.frames)
        return CalibratedPages(blocks, form, basis)

    def count(self, counts: dict[str, int], kv_heads: int, row_bytes: int) -> dict[str, int]:
        counted = dict(counts)
        attended = counted.pop("rows_read_in_place") + counts["rows_hit"] + counts["rows_missed"]
        if self.uses_hot_cache:  # the current token's row comes from no cache and no host page
            attended += counts["decode_tokens"] * kv_heads
        return counted | {"rows_attended": attended, "bytes_fetched": counts["rows_missed"] * row_bytes}

    def describe(self, recent: dict[str, int], seconds: float) -> str:
        hit, missed, fetched = recent["rows_hit"], recent["rows_missed"], recent["bytes_fetched"] / 2**20
        rate = 100 * hit / (hit + missed) if hit + missed else 0.0
        return (
            f"rows attended {recent['rows_attended']:,}, hit {hit:,}, missed {missed:,} (hit rate {rate:.1f} %), "
            f"fetched {fetched:.1f} MiB ({fetched / seconds:.1f} MiB/s)"
        )
