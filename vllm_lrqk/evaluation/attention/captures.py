"""Reads what an engine captured: queries, keys and values of every layer, in the files of `core/capture.py`."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy
import torch

from vllm_lrqk.core.layer import LayerShape


class CaptureError(ValueError):
    """A captured folder that cannot be read; the message is one sentence."""


@dataclass(frozen=True)
class CapturedLayer:
    """One request's tokens in one layer."""

    request: str
    layer: str
    shape: LayerShape
    query: torch.Tensor
    """[L, H, d]"""
    key: torch.Tensor
    """[L, KV, d]"""
    value: torch.Tensor
    """[L, KV, d]"""
    prompt_tokens: int
    """Tokens that came in prefill chunks."""


def read_capture(folder: Path) -> list[CapturedLayer]:
    """All requests and layers of a captured folder, in order.

    Raises:
        CaptureError: there is nothing to read, tokens are missing, or the layers of a request disagree.
    """
    headers = sorted(folder.glob("request-*/*.json"))
    if not headers:
        raise CaptureError(f"{folder} has no captured requests: set lrqk.capture to a folder and serve some.")
    layers = [_read_layer(header) for header in headers]
    for one, other in pairwise(layers):
        same = one.prompt_tokens == other.prompt_tokens and len(one.query) == len(other.query)
        if one.request == other.request and not same:
            raise CaptureError(
                f"{folder / one.request} is incomplete, {one.layer} has {len(one.query)} tokens and {other.layer} "
                f"{len(other.query)}: end the engine before reading, or capture again."
            )
    return layers


def _read_layer(header: Path) -> CapturedLayer:
    shape = LayerShape(**json.loads(header.read_text()))
    steps, row_file = header.with_suffix(".steps"), header.with_suffix(".rows")
    if not steps.exists() or not row_file.exists():
        raise CaptureError(f"{header} has no tokens beside it: capture again.")
    prompt_tokens, tokens = 0, 0
    for line in steps.read_text().splitlines():
        kind, start, count = line.split()
        if int(start) != tokens:
            raise CaptureError(
                f"{steps} goes from token {tokens} to {start}: capture again with --no-enable-prefix-caching."
            )
        tokens += int(count)
        prompt_tokens += int(count) * (kind == "prefill")
    size, expected = row_file.stat().st_size, tokens * shape.row_bytes
    if size != expected:
        raise CaptureError(f"{row_file} has {size} bytes, but {tokens} tokens need {expected}: capture again.")
    raw = numpy.memmap(row_file, dtype=numpy.uint8, mode="c")  # read as it is used: captures can exceed memory
    rows = torch.from_numpy(raw).view(getattr(torch, shape.dtype)).view(tokens, *shape.row_shape)
    query, key, value = rows.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
    return CapturedLayer(header.parent.name, header.stem, shape, query, key, value, prompt_tokens)
