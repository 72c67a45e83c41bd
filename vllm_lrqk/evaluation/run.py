"""From a checked command line to records: engines one after the other, each asked what is still missing."""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vllm_lrqk.evaluation.arguments import Configuration
from vllm_lrqk.evaluation.datasets import dataset_prompts, split_name
from vllm_lrqk.evaluation.engine import Batch, Engine
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.methods import has_host_tier, settings_key
from vllm_lrqk.evaluation.prompts import Prompt, Tokens, mean_divergence, perplexity_prompts, task_prompts
from vllm_lrqk.evaluation.records import Record, Store, fingerprint

DISTRIBUTIONS = "distributions"
"""Folder, in that of the records, of what perplexities under other methods are compared with."""
GIB = 1 << 30
SPARE_PAGES = 2  # per request, beside its own: the null page and the one that fills


def load_model(name: str) -> tuple[Any, Any]:
    """The text model's configuration and the tokenizer. Raises EvaluationError if they cannot be read."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoConfig.from_pretrained(name).get_text_config(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"MODEL {name!r} cannot be loaded: {reason}") from error


def make_prompts(arguments: argparse.Namespace, tokens: Tokens, context: int) -> list[Prompt]:
    """Everything that is asked of each configuration. Raises EvaluationError if something does not fit `context`."""
    for length in arguments.lengths if arguments.tasks or arguments.perplexity else []:
        if length > context:
            raise EvaluationError(f"--lengths: {length} tokens are beyond the model's context of {context}; use less.")
    seeds = list(range(arguments.seed, arguments.seed + arguments.samples))
    prompts: list[Prompt] = []
    with tqdm(desc="making prompts", unit="prompt", leave=False) as bar:
        for length in arguments.lengths:
            for task in arguments.tasks:
                prompts += task_prompts(task, length, seeds, arguments.multi_turn, tokens)
                bar.update(len(prompts) - bar.n)
            for file in arguments.perplexity:
                kept = arguments.output / DISTRIBUTIONS
                prompts += perplexity_prompts(file, length, arguments.samples, arguments.continuation, tokens, kept)
                bar.update(len(prompts) - bar.n)
        for file, scorer in map(split_name, arguments.jsonl):
            prompts += dataset_prompts(file, scorer, arguments.samples, context, tokens)
            bar.update(len(prompts) - bar.n)
    return prompts


def identity(arguments: argparse.Namespace, configurations: list[Configuration]) -> dict[str, Any]:
    """All that a record depends on beside its own key."""
    model = Path(arguments.model)
    files = [*arguments.perplexity, *(split_name(text)[0] for text in arguments.jsonl)]
    return {
        "model": str(model.resolve()) if model.exists() else arguments.model,
        "model_fingerprint": fingerprint(model) if model.exists() else None,
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_model_len,
        "engine": json_text(arguments.engine),
        "eager": arguments.eager,
        "chat": arguments.chat,
        "decode_question": arguments.decode_question,
        "multi_turn": arguments.multi_turn,
        "continuation": arguments.continuation,
        "scorers": {split_name(text)[0].name: split_name(text)[1] for text in arguments.jsonl},
        "files": {file.name: fingerprint(file) for file in files},
        "configurations": {c.name: asdict(c) for c in configurations},
    }


def json_text(value: Any) -> str:
    """The same text for equal values."""
    return json.dumps(value, sort_keys=True)


def evaluate(
    arguments: argparse.Namespace,
    configurations: list[Configuration],
    prompts: list[Prompt],
    store: Store,
    engine_settings: Callable[[str | None, dict[str, Any]], dict[str, Any]],
) -> list[Record]:
    """Answer what `store` has no record of; the records of all prompts under all configurations."""
    total = len(prompts) * len(configurations)
    asked = {c.name: _missing(c, configurations, prompts, store) for c in configurations}
    done = total - sum(map(len, asked.values()))
    with tqdm(total=total, initial=done, desc="evaluating", unit="prompt") as bar:
        for configuration in configurations:
            for settings, group in _by_settings(configuration, asked[configuration.name]):
                bar.set_postfix_str(configuration.name)
                log = arguments.output / "engine.log"
                engine = Engine(engine_settings(configuration.backend, settings), configuration.backend, log)
                try:
                    for batch in _batches(group, arguments.batch):
                        answered = engine.answer([prompt.request for prompt in batch])
                        store.add(_records(configuration, batch, answered, engine.about))
                        bar.update(len(batch))
                finally:
                    engine.close()
    return [store.records[_key(configuration, prompt)] for configuration in configurations for prompt in prompts]


def _key(configuration: Configuration, prompt: Prompt) -> tuple[str, str, int, int, int]:
    return configuration.name, prompt.task, prompt.length, prompt.seed, prompt.turn


def _missing(
    configuration: Configuration, configurations: list[Configuration], prompts: list[Prompt], store: Store
) -> list[Prompt]:
    """Prompts without a record; and those whose distributions are gone where another method is to be compared."""

    def is_missing(prompt: Prompt) -> bool:
        if _key(configuration, prompt) not in store.records:
            return True
        file = prompt.request.distributions
        if configuration.backend is not None or file is None or file.exists():
            return False
        return any(_key(other, prompt) not in store.records for other in configurations)

    return [prompt for prompt in prompts if is_missing(prompt)]


def _by_settings(configuration: Configuration, prompts: list[Prompt]) -> Iterator[tuple[dict[str, Any], list[Prompt]]]:
    """Prompts that one engine can serve: all, or those of one length where top_k follows the length."""
    groups: dict[str, tuple[dict[str, Any], list[Prompt]]] = {}
    for prompt in prompts:
        settings = configuration.settings(prompt.length)
        groups.setdefault(json_text(settings), (settings, []))[1].append(prompt)
    yield from groups.values()


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Samples of one task and length that run together; a text's turns come in order, one batch after the other."""
    groups: dict[tuple[str, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((prompt.task, prompt.length), []).append(prompt)
    for group in groups.values():
        seeds = list(dict.fromkeys(prompt.seed for prompt in group))
        for begin in range(0, len(seeds), size):
            together = [prompt for prompt in group if prompt.seed in seeds[begin : begin + size]]
            for turn in sorted({prompt.turn for prompt in together}):
                yield [prompt for prompt in together if prompt.turn == turn]


def _records(configuration: Configuration, prompts: list[Prompt], batch: Batch, about: dict[str, Any]) -> list[Record]:
    shares = {name: count / len(prompts) for name, count in batch.counts.items()}
    records = []
    for prompt, output in zip(prompts, batch.outputs):
        score, text = prompt.score(output)
        record = Record(
            configuration=configuration.name,
            task=prompt.task,
            length=prompt.length,
            seed=prompt.seed,
            turn=prompt.turn,
            score=score,
            output=text,
            prompt_tokens=len(prompt.request.token_ids) + len(prompt.request.forced_ids),
            device_bytes_per_token=about["device_bytes_per_token"],
            device_bytes_per_request=about["device_bytes_per_request"],
            divergence=mean_divergence(output),
            steps=shares["decode_tokens"] * about["kv_heads"] if "decode_tokens" in shares else None,
            rows_attended=shares.get("rows_attended"),
            rows_hit=shares.get("rows_hit"),
            rows_missed=shares.get("rows_missed"),
        )
        records.append(record)
    return records


def engine_settings(
    arguments: argparse.Namespace, config: Any, prompts: list[Prompt]
) -> Callable[[str | None, dict[str, Any]], dict[str, Any]]:
    """Arguments of `LLM` for a backend and its settings: memory for `--batch` texts, all else vLLM's defaults."""
    needed = max(prompt.tokens for prompt in prompts)
    length = arguments.max_model_len or needed
    if length < needed:
        raise EvaluationError(f"--max-model-len is {length}, but a prompt and its answer take {needed}: raise it.")
    item_size = 2 if "16" in (str(config.dtype) if arguments.dtype == "auto" else arguments.dtype) else 4
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * kv_heads * head_size * item_size

    def settings(backend: str | None, method: dict[str, Any]) -> dict[str, Any]:
        page_size = method.get("page_size", 256)
        pages = math.ceil(length / page_size) + SPARE_PAGES
        memory = (arguments.batch * pages + SPARE_PAGES) * page_size * token_bytes
        common = {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "max_model_len": length,
            "max_num_seqs": arguments.batch,
            "enforce_eager": arguments.eager,
            "seed": 0,
        }
        if backend is not None:
            memory_setting = {"host_memory_gib": memory / GIB} if has_host_tier(backend) else {}
            common["additional_config"] = {settings_key(backend): memory_setting | method}
        if on_cpu() and (backend is None or not has_host_tier(backend)):
            common["kv_cache_memory_bytes"] = memory
        return common | arguments.engine

    return settings


def on_cpu() -> bool:
    """Whether engines run on the CPU."""
    import torch

    return not torch.cuda.is_available()
