"""Compiles LoLA's Triton kernels for GPUs that need not be there; prints one JSON line per kernel.

Its own process: in the tests' process Triton interprets.
"""

import json
import sys
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_compile import TYPES, make_source

from vllm_lrqk.methods.lola import triton_advance, triton_attend

COMMON = {"KV_HEADS": 8, "HEAD_SIZE": 128, "D": 128, "R": 16, "WINDOW": 192, "CHUNK": 64, "CACHE": 236}
COMMON |= {"CACHE_SHIFT": 65536}


def advance_source(dtype: str, rank: int, is_decode: bool) -> ASTSource:
    element = f"*{TYPES[dtype]}"
    signature = dict.fromkeys(triton_advance._advance_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("key", "value", "rows"), element)
    signature |= dict.fromkeys(("key_mean", "value_mean", "cross_moment", "second_moment", "directions"), "*fp32")
    signature |= {"scores": "*fp32", "targets": "*i32", "blocks": "*i32", "positions": "*i32", "seq_lens": "*i32"}
    signature |= {"ridge": "fp32", "least_variance": "fp32"}
    constants = COMMON | {
        "RANK": rank,
        "SINKS": 4,
        "IS_RANDOM": False,
        "N": 512,
        "ROWS": triton_advance.tile_rows(getattr(torch, dtype)),
    }
    constants |= {} if is_decode else {"seq_lens": None}
    return make_source(triton_advance._advance_kernel, signature, constants)


def attend_source(dtype: str, rank: int, is_decode: bool) -> ASTSource:
    element = f"*{TYPES[dtype]}"
    signature = dict.fromkeys(triton_attend._attend_kernel.arg_names, "i32")
    signature |= dict.fromkeys(("query", "rows"), element)
    signature |= dict.fromkeys(("key_mean", "value_mean", "cross_moment", "directions"), "*fp32")
    signature |= dict.fromkeys(("part_output", "part_max", "part_sum"), "*fp32")
    signature |= {"blocks": "*i32", "seq_lens": "*i32", "scale": "fp32"}
    constants = COMMON | {
        "RANK": rank,
        "GROUP": 4,
        "M": 16 if is_decode else triton_attend.query_rows(getattr(torch, dtype)),
    }
    constants["ROWS"] = triton_attend.TILE // (2 if dtype == "float32" else 1)
    constants |= {"DOT": getattr(triton.language, dtype)} | ({} if is_decode else {"seq_lens": None})
    return make_source(triton_attend._attend_kernel, signature, constants)


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for dtype, is_decode in product(("bfloat16", "float32"), (True, False)):
            for name, make in (("advance", advance_source), ("attend", attend_source)):
                target = GPUTarget("cuda", capability, 32)
                compiled = triton.compile(make(dtype, 16, is_decode), target=target, options={"num_warps": 4})
                result = {
                    "kernel": f"{name} {dtype} {'decode' if is_decode else 'prefill'}",
                    "capability": capability,
                    "shared_bytes": compiled.metadata.shared,
                    "cubin_bytes": len(compiled.asm["cubin"]),
                }
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
