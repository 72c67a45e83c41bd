"""Parts of attention over disjoint sets of rows, and the Triton kernel that merges them.

Shapes: B requests, H query heads, KV kv heads, G = H / KV, d head size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts"])
def _combine_kernel(
    part_output,
    part_max,
    part_sum,
    output,  # [B, H, d]
    output_request_stride,
    output_head_stride,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    item = request * (HEADS // GROUP) + head // GROUP
    part, column = tl.arange(0, PARTS_BLOCK), tl.arange(0, HEAD_BLOCK)
    at = (item * parts + part) * GROUP + head % GROUP
    is_part, is_column = part < parts, column < HEAD_SIZE
    highest = tl.load(part_max + at, mask=is_part, other=float("-inf"))
    sums = tl.load(part_sum + at, mask=is_part, other=0.0)
    top = tl.max(highest, 0)
    weight = tl.exp2(highest - tl.where(top == float("-inf"), 0.0, top))
    mask = is_part[:, None] & is_column[None, :]
    outputs = tl.load(part_output + at[:, None] * HEAD_SIZE + column[None, :], mask=mask, other=0.0)
    total = tl.sum(weight * sums, 0)
    result = tl.sum(weight[:, None] * outputs, 0) / tl.where(total == 0.0, 1.0, total)
    to = output + request * output_request_stride + head * output_head_stride + column
    tl.store(to, result.to(output.dtype.element_ty), mask=is_column)


@dataclass
class Parts:
    """Attention over disjoint sets of rows, to be combined; all float32."""

    output: torch.Tensor
    """[B * KV, parts, G, d]"""
    highest: torch.Tensor
    """[B * KV, parts, G]"""
    sums: torch.Tensor
    """[B * KV, parts, G]"""

    def cut(self, items: int, parts: int) -> "Parts":
        """The same memory for other numbers of items and parts; at most as many together."""
        group, head_size = self.output.shape[2:]
        count = items * parts * group
        return Parts(
            self.output.view(-1)[: count * head_size].view(items, parts, group, head_size),
            self.highest.view(-1)[:count].view(items, parts, group),
            self.sums.view(-1)[:count].view(items, parts, group),
        )


def parts_block(parts: int) -> int:
    """The size that `combine` is compiled for; all else depends on the layer's shapes alone."""
    return triton.next_power_of_2(parts)


def allocate_parts(requests: int, kv_heads: int, parts: int, group: int, head_size: int, device: torch.device) -> Parts:
    """Memory for the parts of one step."""
    shape = (requests * kv_heads, parts, group)
    return Parts(
        *(torch.empty(*tail, dtype=torch.float32, device=device) for tail in ((*shape, head_size), shape, shape))
    )


def combine(parts: Parts, output: torch.Tensor) -> None:
    """Merge the parts into output [B, H, d]; a request without any row gets zeros."""
    requests, heads, head_size = output.shape
    _combine_kernel[(requests, heads)](
        parts.output,
        parts.highest,
        parts.sums,
        output,
        output.stride(0),
        output.stride(1),
        parts.output.shape[1],
        HEADS=heads,
        GROUP=parts.output.shape[2],
        HEAD_SIZE=head_size,
        HEAD_BLOCK=max(16, triton.next_power_of_2(head_size)),
        PARTS_BLOCK=parts_block(parts.output.shape[1]),
    )
