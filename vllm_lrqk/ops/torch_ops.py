"""The plain torch forms as a table of kernels: the truth for all others, and the fallback."""

from vllm_lrqk.decode import decode_attention
from vllm_lrqk.factors import seal_pages
from vllm_lrqk.ops import Kernels
from vllm_lrqk.prefill import append_rows, prefill_attention
from vllm_lrqk.select import select


def kernels() -> Kernels:
    return Kernels("torch", append_rows, seal_pages, select, decode_attention, prefill_attention)
