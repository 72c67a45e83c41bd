"""Compiles the Triton kernels for GPUs that need not be there; prints one JSON line per kernel.

Its own process: in the tests' process Triton interprets.
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lrqk.devices import triton_parts
from vllm_lrqk.methods.lrqk import triton_attend

TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def make_source(kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """A kernel's source for arguments whose pointers and integers are multiples of 16, as Triton finds them to be."""
    signature = signature | dict.fromkeys(constants, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] in "*i" and not kernel.params[i].do_not_specialize
    }
    return ASTSource(kernel, signature, constants, attrs=aligned)


def attend_source(dtype: str, group: int, head_size: int, pages: str | None = None) -> ASTSource:
    """For rows, or for the residual of pages: with the type of linear values, or by the pages' "mean" values alone."""
    factor = None if pages == "mean" else pages
    element = TYPES[dtype]
    signature = dict.fromkeys(triton_attend._attend_kernel.arg_names, "i32")
    signature |= {"query": f"*{element}", "base": f"*{element}", "address": "*i64", "residual": "*fp32"}
    signature |= {"value_mean": "*bf16", "block_table": "*i32", "scale": "fp32"}
    signature["value_projection"] = f"*{factor or 'i8'}"
    signature |= dict.fromkeys(("moment", "value_scale", "key_factor_mean"), "*fp32")
    signature |= dict.fromkeys(("part_output", "part_max", "part_sum"), "*fp32")
    constants = {
        "HAS_ROWS": pages is None,
        "HAS_RESIDUAL": pages is not None,
        "VALUE_RANK": 16 if factor else 0,
        "KV_HEADS": 8,
        "GROUP": group,
        "GROUP_BLOCK": 16,
        "HEAD_SIZE": head_size,
        "HEAD_BLOCK": triton.next_power_of_2(head_size),
        "ROW_ITEM_BYTES": 4 if dtype == "float32" else 2,
        "TILE": triton_attend.ROWS_PER_TILE,
        "DOT": getattr(triton.language, dtype),
        "FACTOR_DOT": getattr(triton.language, "float32" if dtype == "float32" else "bfloat16"),
    }
    return make_source(triton_attend._attend_kernel, signature, constants)


def combine_source(dtype: str) -> ASTSource:
    signature = dict.fromkeys(triton_parts._combine_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("part_output", "part_max", "part_sum"), "*fp32")
    signature["output"] = f"*{TYPES[dtype]}"
    constants = {"HEADS": 32, "GROUP": 4, "HEAD_SIZE": 128, "HEAD_BLOCK": 128, "PARTS_BLOCK": 64}
    return make_source(triton_parts._combine_kernel, signature, constants)


def main() -> None:
    sources = {f"attend rows {dtype} {group} {size}": attend_source(dtype, group, size)
               for dtype in TYPES for group, size in ((4, 128), (7, 96), (1, 64))}  # fmt: skip
    sources |= {f"attend pages {dtype} {kind}": attend_source(dtype, 4, 128, kind)
                for dtype in TYPES for kind in ("mean", "i8", "bf16")}  # fmt: skip
    sources |= {f"combine {dtype}": combine_source(dtype) for dtype in TYPES}
    for capability in map(int, sys.argv[1:]):
        for name, source in sources.items():
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
            result = {
                "kernel": name,
                "capability": capability,
                "shared_bytes": compiled.metadata.shared,
                "cubin_bytes": len(compiled.asm["cubin"]),
                "tensor_core_products": len(re.findall(r"\b(?:wg)?mma\.\S*sync", compiled.asm["ptx"])),
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
            }
            print(json.dumps(result))


if __name__ == "__main__":
    main()
