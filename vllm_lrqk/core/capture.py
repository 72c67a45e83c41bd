"""Files with the queries, keys and values that the attention layers of an engine saw, for later study.

    FOLDER/request-0000/LAYER.json     heads, kv_heads, head_size, dtype, scale
    FOLDER/request-0000/LAYER.steps    a line per step: "prefill" or "decode", first token, tokens
    FOLDER/request-0000/LAYER.rows     [tokens, H + 2 KV, d]: query, key and value heads of each token, raw

Files are only appended to, so that what an engine wrote before it was ended can be read
(`evaluation/attention/captures.py`). With several ranks LAYER ends in "-rank" and a number; each rank has heads of
its own.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy
import torch

from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.step import Step


class LayerCapture:
    """Writes one layer's tokens.

    A request is known by its first page: while it lives no other request has it, and a chunk that starts at
    token 0 is a new request (or one that was preempted and is computed anew).

    Args:
        name: of the layer, part of the file names.
        max_tokens: the first step that would go beyond this many tokens ends the capture.
    """

    def __init__(self, folder: Path, name: str, shape: LayerShape, max_tokens: int) -> None:
        self.folder, self.name, self.shape = folder, name, shape
        self.tokens_left = max_tokens
        self._requests: dict[int, int] = {}
        self._started = 0

    def write(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step: Step) -> None:
        """Append the tokens of one step.

        Args:
            query: [T, H, d].
            key, value: [T, KV, d].
        """
        if step.num_tokens > self.tokens_left:
            self.tokens_left = 0
            return
        self.tokens_left -= step.num_tokens
        rows = torch.cat([query, key, value], 1).cpu().contiguous().view(torch.uint8).numpy()
        for chunk in step.prefill:
            self._append(int(chunk.pages[0]), "prefill", chunk.context_len, rows[chunk.tokens])
        first_pages, lengths = step.block_table[: step.num_decodes, 0].tolist(), step.seq_lens.tolist()
        for token, (page, length) in enumerate(zip(first_pages, lengths)):
            self._append(page, "decode", length - 1, rows[token : token + 1])

    def _start(self, page: int) -> None:
        self._requests[page] = self._started
        self._started += 1
        header = self._path(page, "json")
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(json.dumps(asdict(self.shape)) + "\n")

    def _append(self, page: int, kind: str, context_len: int, rows: numpy.ndarray) -> None:
        if context_len == 0:
            self._start(page)
        with self._path(page, "rows").open("ab") as file:
            file.write(rows.tobytes())
        with self._path(page, "steps").open("a") as file:
            file.write(f"{kind} {context_len} {len(rows)}\n")

    def _path(self, page: int, suffix: str) -> Path:
        return self.folder / f"request-{self._requests[page]:04d}" / f"{self.name}.{suffix}"
