"""The plain torch forms as a table of kernels: the truth for all others, and the fallback."""

from vllm_lrqk.core.host_pages import append_rows
from vllm_lrqk.core.prefill import prefill_attention
from vllm_lrqk.methods.lrqk.calibrated_seal import seal_pages as seal_calibrated
from vllm_lrqk.methods.lrqk.decode import decode_attention
from vllm_lrqk.methods.lrqk.kernels import Kernels
from vllm_lrqk.methods.lrqk.score import select
from vllm_lrqk.methods.lrqk.seal import seal_pages


def kernels() -> Kernels:
    return Kernels(
        name="torch",
        seal_pages=seal_pages,
        prefill_attention=prefill_attention,
        append_rows=append_rows,
        seal_calibrated=seal_calibrated,
        select=select,
        decode_attention=decode_attention,
    )
