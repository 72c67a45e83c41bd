"""One attention layer of LRQK with calibrated factors."""

import torch

from vllm_lrqk.core.calibration import CalibrationFile
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.step import FilledPages, PrefillChunk
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.layer import LRQKLayer
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


def check_calibration(file: CalibrationFile, config: LRQKSettings, model: ModelFacts) -> None:
    """Raise ConfigError for a file whose page frames do not serve these settings."""
    path = f"lrqk.calibration is {config.calibration!r}"
    if file.frames is None:
        forms = ", ".join(file.refused) or "its RoPE"
        raise ConfigError(
            f"{path}, which has no page frames, as keys of {model.name} cannot be rotated back with {forms}: "
            'set lrqk.factorization to "lrqk".'
        )
    if file.page_size != config.page_size:
        raise ConfigError(
            f"{path}, made for pages of {file.page_size} tokens, but lrqk.page_size is {config.page_size}: "
            f"make one with vllm-lrqk calibrate {model.name} --page-size {config.page_size} --output FILE."
        )
    if 2 * config.rank > model.head_size:
        raise ConfigError(
            f"lrqk.rank is {config.rank}, but calibrated factors have twice as many columns, and the head size of "
            f"{model.name} is {model.head_size}: set it to {model.head_size // 2} or less."
        )
    positions = len(file.frames.cos) * file.page_size
    if model.max_model_len > positions:
        raise ConfigError(
            f"{path}, which knows {positions} positions, but --max-model-len is {model.max_model_len}: lower it."
        )


class CalibratedLayer(LRQKLayer):
    """Seals pages by where they are in their request."""

    kernels: Kernels

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        place = self.host, chunk.pages, chunk.context_len, self.scale
        self.kernels.prefill_attention(query, key, value, *place, output, self.logits)
        numbers = torch.tensor(chunk.filled, dtype=torch.int64)
        if len(numbers):
            self._seal_numbered(chunk.pages[numbers].long(), numbers)

    def seal(self, filled: FilledPages) -> None:
        self._seal_numbered(filled.pages, filled.numbers)

    def _seal_numbered(self, pages: torch.Tensor, numbers: torch.Tensor) -> None:
        assert isinstance(self.factors, CalibratedPages)
        self.kernels.seal_calibrated(pages, numbers, self.host, self.factors)
        self.counters.pages_sealed += len(pages)
