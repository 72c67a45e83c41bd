"""`vllm-lrqk calibrate`: runs a model on text and writes what its queries, keys and values are like.

vllm-lrqk calibrate MODEL --output FILE
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lrqk.calibration.texts import read_texts, windows
from vllm_lrqk.core.calibration import ModelIdentity, write_calibration
from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.core.moments import Moments, mean_moments
from vllm_lrqk.core.rotary import RotaryTable

WINDOW = 4096
"""Tokens of a text that is read at once: what is long enough for positions to matter, and short enough to be quick."""
SPARE_TOKENS = 2048
"""Of the cache beside a window: the null block and one that fills, whatever their size."""


@dataclass(frozen=True)
class Calibrated:
    """What a run over the text found."""

    identity: ModelIdentity
    layers: dict[int, Moments]
    """By the number of the attention layer."""
    frames: RotaryTable | None
    """Of pages; None where the RoPE cannot be turned back."""
    refused: list[str]
    """Names of such forms of RoPE."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lrqk calibrate", description="Run a model on text and write the calibration file of its layers."
    )
    add = parser.add_argument
    add("model", help="folder or name of a model")
    add("--output", type=Path, required=True, metavar="FILE", help="the calibration, a safetensors file")
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="default: sources of Python's library")
    add("--tokens", type=int, default=16384, help="of the text that are used; default 16384")
    add("--window", type=int, default=None, help=f"tokens read as one text; default {WINDOW} or the model's context")
    add("--page-size", type=int, default=256, help="tokens per page, as of lrqk.page_size; default 256")
    add("--dtype", default="auto", help="as of vLLM")
    add("--engine", type=_json_object, default={}, metavar="JSON", help="further arguments of vLLM's LLM")
    return parser


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object such as {{"tensor_parallel_size": 2}}')
    return value


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, that of the process if none is given; ends the process with a sentence if it is wrong."""
    parsed = make_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(parsed)
    except ConfigError as error:
        raise SystemExit(f"vllm-lrqk calibrate: {error}") from error


def _run(arguments: argparse.Namespace) -> None:
    for name, least in (("tokens", 1), ("window", 2), ("page_size", 16)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be {least} or more.")
    if arguments.output.parent.resolve() == Path(arguments.model).resolve():
        raise ConfigError(
            f"--output is {arguments.output}, but vLLM loads every safetensors file of a model's folder as weights: "
            "name a file elsewhere."
        )
    if arguments.engine.get("pipeline_parallel_size", 1) > 1:
        size = arguments.engine["pipeline_parallel_size"]
        raise ConfigError(
            f"--engine has pipeline_parallel_size {size}, but calibration needs 1: use tensor parallelism."
        )
    try:
        import tqdm  # noqa: F401
        from transformers import AutoConfig, AutoTokenizer
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing: pip install vllm-lrqk[eval].") from error
    try:
        config = AutoConfig.from_pretrained(arguments.model).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"MODEL {arguments.model!r} cannot be loaded: {reason}") from error
    context, page_size = config.max_position_embeddings, arguments.page_size
    window = arguments.window or min(WINDOW, max((context - 1) // page_size * page_size, 2))
    if window >= context:
        raise ConfigError(f"--window is {window}, but must be below the model's context of {context} tokens.")

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, verbose=False))

    prompts = windows(read_texts(arguments.text), encode, arguments.tokens, window)
    engine = {"dtype": arguments.dtype, **_cache_size(config, window), **arguments.engine}
    try:
        found = calibrate(arguments.model, prompts, window, page_size, engine)
    except ValueError as error:
        errors = error.errors() if hasattr(error, "errors") else []
        raise ConfigError(f"vLLM: {errors[0]['msg'] if errors else error}") from error
    how = arguments.tokens, page_size, found.frames, found.refused
    write_calibration(arguments.output, found.identity, found.layers, *how)
    if found.refused:
        forms = ", ".join(found.refused)
        print(f"LRQK cannot use {arguments.output}: keys cannot be rotated back with {forms}. AQUA can.")
    megabytes = arguments.output.stat().st_size / 1e6
    print(f"{len(found.layers)} layers, {arguments.tokens} tokens: {arguments.output} ({megabytes:.1f} MB).")


def _cache_size(config: Any, window: int) -> dict[str, Any]:
    """On the CPU platform a cache of one window: vLLM would otherwise ask for most of the memory."""
    import torch

    if torch.cuda.is_available():
        return {}
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * kv_heads * head_size * torch.float32.itemsize
    return {"kv_cache_memory_bytes": (window + SPARE_TOKENS) * token_bytes}


def calibrate(
    model: str, prompts: Iterable[list[int]], window: int, page_size: int, engine: dict[str, Any]
) -> Calibrated:
    """Moments of every attention layer of a model that reads the prompts one by one.

    Args:
        prompts: token ids, at most `window` each.
        page_size: tokens per page of the page frames.
        engine: further arguments of `LLM`.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # matrices come back without being serialised
    from tqdm import tqdm
    from vllm import LLM, SamplingParams, TokensPrompt

    settings: dict[str, Any] = {
        "max_model_len": window + 1,
        "max_num_seqs": 1,
        "max_num_batched_tokens": max(window + 1, 256),
        "enable_prefix_caching": False,  # every token has to be computed
        "enforce_eager": True,  # hooks are Python, and steps are not padded
        "seed": 0,
        "worker_extension_cls": "vllm_lrqk.integration.calibration.CalibrationExtension",
        **engine,
    }
    llm = LLM(model=model, **settings)
    try:
        started = llm.collective_rpc("start_calibration", args=(page_size,))[0]
        once = SamplingParams(max_tokens=1, detokenize=False)
        for ids in tqdm(prompts, desc="calibrating", unit="window"):
            llm.generate(TokensPrompt(prompt_token_ids=ids), once, use_tqdm=False)
        ranks = llm.collective_rpc("finish_calibration")
        kv_heads = llm.llm_engine.vllm_config.model_config.get_total_num_kv_heads()
    finally:
        llm.llm_engine.engine_core.shutdown()
    layers = {name: mean_moments([rank[name] for rank in ranks], kv_heads) for name in ranks[0]}
    return Calibrated(started["identity"], layers, started["frames"], started["refused"])
