"""Calibration files of test models."""

from pathlib import Path
from typing import Any

from engines import MIB, token_prompts

from vllm_lrqk.calibration.command import calibrate
from vllm_lrqk.core.calibration import write_calibration


def calibration_of(model: Path, page_size: int = 64, file: Path | None = None, **engine: Any) -> str:
    """A tiny model's calibration file, made on first use from random tokens; by default one beside it."""
    path = file or model / f"calibration-{page_size}.safetensors"
    if not path.exists():
        prompts = [prompt["prompt_token_ids"] for prompt in token_prompts([256, 100], seed=5)]
        settings = {"dtype": "float32", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 16 * MIB, **engine}
        found = calibrate(str(model), prompts, 256, page_size, settings)
        write_calibration(path, found.identity, found.layers, 356, page_size, found.frames)
    return str(path)
