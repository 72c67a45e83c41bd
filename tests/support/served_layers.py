"""One layer served twice, with the CUDA decoder on any device and with the plain torch one on the CPU.

Requests come, grow, are taken away and leave their pages to others, as vLLM's scheduler has it.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from pages import empty_factors, page_format, relative

from vllm_lrqk.core.counters import Counters
from vllm_lrqk.core.hot_rows import HotFormat
from vllm_lrqk.core.step import Step, build_step, filled_pages
from vllm_lrqk.devices.cuda_hot_rows import DeviceHotCache
from vllm_lrqk.methods.lrqk import cuda
from vllm_lrqk.methods.lrqk.cpu_decoders import TALLIES, InPlaceDecoder
from vllm_lrqk.methods.lrqk.cuda_decode import DecodePath
from vllm_lrqk.methods.lrqk.cuda_decoder import CudaDecoder
from vllm_lrqk.methods.lrqk.format import FactorPages
from vllm_lrqk.methods.lrqk.layer import LRQKLayer
from vllm_lrqk.methods.lrqk.settings import LRQKSettings
from vllm_lrqk.methods.lrqk.torch_ops import kernels as torch_kernels

MAX_TOKENS = 64


@dataclass
class Request:
    pages: list[int] = field(default_factory=list)
    hot_blocks: list[int] = field(default_factory=list)
    length: int = 0


class ServedLayers:
    """Both layer states, the requests' pages, and the tensors that vLLM keeps at fixed addresses.

    Args:
        device: of everything but the host pages, which stay where `pin` leaves them.
        pin: makes the host pages readable for the device.
        at_once: requests that the decode path serves at a time.
    """

    def __init__(
        self,
        operators: Any,
        config: LRQKSettings,
        device: torch.device,
        pin: Any = lambda host: host,
        num_pages: int = 14,
        max_requests: int = 4,
        at_once: int = 4,
        kv_heads: int = 1,
        group: int = 2,
        d: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.generator = torch.Generator().manual_seed(0)
        n, heads, scale = config.page_size, kv_heads * group, d**-0.5
        host = torch.full((num_pages, kv_heads, n, 2, d), torch.nan, dtype=dtype)
        factors, counters = empty_factors(config, d, num_pages, kv_heads), Counters(TALLIES, 1, torch.device("cpu"))
        in_place = InPlaceDecoder(factors, host, torch_kernels(), scale, config, counters.tallies[0])
        self.expected = LRQKLayer(factors, host, in_place, torch_kernels(), scale, config, counters)
        hot_format = HotFormat(page_format(config, d).page_bytes, d, dtype)
        self.hot_blocks_per_request = hot_format.blocks_for(config.num_hot_rows)
        blocks = num_pages + max_requests * self.hot_blocks_per_request
        # vLLM hands out zeroed memory, and blocks as hot rows or as factor pages in turn.
        raw = torch.zeros(blocks, kv_heads, hot_format.block_bytes, dtype=torch.uint8, device=device)
        max_pages = num_pages
        self.path = DecodePath(
            operators, at_once, max_pages, heads, kv_heads, hot_format, self.hot_blocks_per_request, config, device
        )
        self.path.workspace._moment.fill_(torch.nan)  # as that of pages without candidates may be
        counters = Counters(TALLIES, 1, device)
        factors, host = FactorPages(raw, page_format(config, d)), pin(host.clone())
        self.hot = DeviceHotCache(operators, raw.clone(), hot_format, num_pages, counters.tallies[0, :2])
        decoder = CudaDecoder(factors, host, self.hot, self.path, scale)
        self.layer = LRQKLayer(factors, host, decoder, cuda.kernels(operators), scale, config, counters)
        self.free_pages = list(range(1, num_pages))
        self.free_hot_blocks = list(range(num_pages, blocks))

        def buffer(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.block_table = buffer(max_requests, max_pages + 1, dtype=torch.int32)
        self.hot_table = buffer(max_requests, self.hot_blocks_per_request + 1, dtype=torch.int32)
        self.seq_lens = buffer(max_requests, dtype=torch.int32)
        self.slot_mapping = buffer(MAX_TOKENS, dtype=torch.int64)
        self.query, self.output = buffer(MAX_TOKENS, heads, d), buffer(MAX_TOKENS, heads, d)
        self.key, self.value = buffer(MAX_TOKENS, kv_heads, d), buffer(MAX_TOKENS, kv_heads, d)
        self._filled: torch.Tensor | None = None
        self._filled_expected: torch.Tensor | None = None

    def admit(self) -> Request:
        count = self.hot_blocks_per_request
        request = Request(hot_blocks=self.free_hot_blocks[-count:])
        del self.free_hot_blocks[-count:]
        return request

    def release(self, request: Request) -> None:
        """Give its pages and hot blocks back; the next request gets them first."""
        self.free_pages += request.pages
        self.free_hot_blocks += request.hot_blocks

    def capture(self, requests: int) -> Step:
        """The step of a graph of `requests` decode requests; all are padding until the buffers say otherwise."""
        self.seq_lens.zero_()
        self.slot_mapping.fill_(-1)
        starts = list(range(requests + 1))
        return build_step(starts, [1] * requests, *self._tables(requests), self.config.page_size)

    def replay(self, captured: Step) -> None:
        """What a graph of this step does."""
        count = captured.num_tokens
        rows = (self.query[:count], self.key[:count], self.value[:count])
        self.layer.forward(*rows, captured, self._hot_table(), self.output[:count])

    def prepare(self, batch: list[tuple[Request, int]]) -> Step:
        """Draw new tokens for some requests, run the torch form, fill the buffers and seal what the last step filled.

        Args:
            batch: requests and how many tokens each gets; those with one token come first.
        """
        config, n = self.config, self.config.page_size
        counts = [count for _, count in batch]
        starts = [0, *accumulate(counts)]
        total = starts[-1]
        table = torch.zeros(len(batch), self.block_table.shape[1], dtype=torch.int32)
        slot_mapping = []
        for row, (request, count) in enumerate(batch):
            for position in range(request.length, request.length + count):
                if position % n == 0:
                    request.pages.append(self.free_pages.pop())
                slot_mapping.append(request.pages[position // n] * n + position % n)
            request.length += count
            table[row, : len(request.pages)] = torch.tensor(request.pages)
        lens = [request.length for request, _ in batch]
        query, key, value = (
            torch.randn(total, x.shape[1], x.shape[2], generator=self.generator).to(self.dtype)
            for x in (self.query, self.key, self.value)
        )
        self.answer = torch.full_like(query, torch.nan)
        if self._filled_expected is not None:
            self.expected.seal(self._filled_expected)
        step = build_step(starts, lens, table, torch.tensor(lens).int(), torch.tensor(slot_mapping), n)
        self._filled_expected = filled_pages(step)
        self.expected.forward(query, key, value, step, None, self.answer)

        for buffer, values in ((self.query, query), (self.key, key), (self.value, value), (self.block_table, table)):
            buffer.fill_(1 << 30 if buffer is self.block_table else torch.nan)
            buffer[: len(values)] = values.to(self.device)
        self.hot_table.fill_(1 << 30)
        hot = torch.tensor([request.hot_blocks for request, _ in batch], dtype=torch.int32)
        self.hot_table[: len(batch), : self.hot_blocks_per_request] = hot.to(self.device)
        self.slot_mapping.fill_(-1)
        self.slot_mapping[:total] = torch.tensor(slot_mapping).to(self.device)
        self.seq_lens.zero_()
        self.seq_lens[: len(batch)] = torch.tensor(lens).int().to(self.device)
        self.output.fill_(torch.nan)
        device_step = build_step(starts, lens, *self._tables(len(batch)), config.page_size)
        self.seal(device_step)
        return device_step

    def seal(self, step: Step) -> None:
        """What the worker does before each step."""
        if self._filled is not None:
            self.layer.seal(self._filled)
        self._filled = filled_pages(step)

    def run(self, batch: list[tuple[Request, int]]) -> float:
        """A step outside of a graph; relative error against the torch form."""
        self.replay(self.prepare(batch))
        return self.error()

    def run_captured(self, captured: Step, batch: list[Request]) -> float:
        """A step of one token for each request, as a graph of more requests does it; relative error."""
        self.prepare([(request, 1) for request in batch])
        self.replay(captured)
        assert (self.output[len(batch) : captured.num_tokens] == 0).all()
        return self.error()

    def error(self) -> float:
        return relative(self.output[: len(self.answer)].cpu(), self.answer)

    def _tables(self, requests: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.block_table[:requests], self.seq_lens[:requests], self.slot_mapping

    def _hot_table(self) -> torch.Tensor:
        return self.hot_table[:, : self.hot_blocks_per_request]


def serve(layers: ServedLayers, most: float) -> None:
    """Prompts in chunks, decode steps over page boundaries, a request preempted and its pages taken by another.

    Args:
        most: largest relative error of a step.
    """
    a, b, c = layers.admit(), layers.admit(), layers.admit()
    assert layers.run([(a, 21), (b, 15)]) < most
    assert layers.run([(a, 1), (b, 1), (c, 33)]) < most  # b fills its first page
    captured = layers.capture(4)
    for _ in range(4):
        assert layers.run_captured(captured, [a, b, c]) < most
    layers.release(b)
    for _ in range(2):
        assert layers.run_captured(captured, [a, c]) < most
    late = layers.admit()
    assert layers.run([(a, 1), (c, 1), (late, 16)]) < most  # takes the page and the hot blocks that b had
    for _ in range(8):
        assert layers.run_captured(captured, [late, c, a]) < most  # a fills its second page, c its third
    assert layers.run([(late, 1), (a, 1), (c, 7)]) < most
