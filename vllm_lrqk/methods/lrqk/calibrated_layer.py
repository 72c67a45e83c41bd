"""One attention layer of LRQK with calibrated factors, in the plain torch form."""

from dataclasses import replace

import torch

from vllm_lrqk.core.calibration import CalibrationFile
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.method import ModelFacts
from vllm_lrqk.core.step import PrefillChunk
from vllm_lrqk.methods.lrqk import torch_ops
from vllm_lrqk.methods.lrqk.calibrated_format import CalibratedPages
from vllm_lrqk.methods.lrqk.calibrated_seal import seal_pages
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.layer import LRQKLayer
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


def check_calibration(file: CalibrationFile, config: LRQKSettings, model: ModelFacts) -> None:
    """Raise ConfigError for a file whose page frames do not serve these settings."""
    path = f"lrqk.calibration is {config.calibration!r}"
    if file.frames is None:
        raise ConfigError(
            f"{path}, which has no page frames, as keys of {model.name} cannot be rotated back: "
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


def calibrated_kernels(kernels: Kernels) -> Kernels:
    """Kernels of a device, and the plain torch forms of what reads factors."""
    plain = torch_ops.kernels()
    return replace(kernels, name="torch", select=plain.select, decode_attention=plain.decode_attention)


class CalibratedLayer(LRQKLayer):
    """Seals pages by where they are in their request; the queries at hand do not matter."""

    _numbers: torch.Tensor | None = None
    """int64 [M], where in their requests the pages are that the last step's decode tokens fill."""

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        chunk: PrefillChunk,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        self.kernels.prefill_attention(query, key, value, self.host, chunk.pages, chunk.context_len, self.scale, output)
        numbers = torch.tensor([index for index, _, _ in chunk.filled], dtype=torch.int64)
        if len(numbers):
            self._seal_numbered(chunk.pages[numbers].long(), numbers)

    def decode(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        request_blocks: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        lens = seq_lens.long()
        self._numbers = lens[(lens > 0) & (lens % self.config.page_size == 0)] // self.config.page_size - 1
        super().decode(query, key, value, block_table, seq_lens, request_blocks, output)

    def seal(self, pages: torch.Tensor) -> None:
        assert self._numbers is not None
        self._seal_numbered(pages, self._numbers)

    def _seal_numbered(self, pages: torch.Tensor, numbers: torch.Tensor) -> None:
        assert isinstance(self.factors, CalibratedPages)
        seal_pages(pages, numbers, self.host, self.factors)
        self.counters.pages_sealed += len(pages)
