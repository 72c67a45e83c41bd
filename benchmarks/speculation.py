"""n-gram speculation with LRQK beside vLLM's own CPU backend: the same tokens, acceptance and tokens/s, in one run.

    python benchmarks/speculation.py $(python scripts/get_model.py smollm2-135m) [--prompts 20] [--json FILE]

Four engines (LRQK and CPU_ATTN, each with and without speculation) are alive at once, each in a process of its own, and
take turns prompt by prompt. Every other prompt is a text of the standard library's sources whose beginning is repeated
at the end, so that drafts find what to copy; the others are such texts alone. Answers are greedy. Where an answer with
speculation differs from the one without, "gap" is the difference of the two highest log-probabilities at the first
token that differs: verifying several tokens at once rounds differently, and a near tie may fall either way.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

BACKENDS = ("LRQK", "CPU_ATTN")
COUNTS = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name of a model")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--drafts", type=int, default=3, help="tokens drafted at a time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lrqk", type=json.loads, default={}, metavar="JSON", help="settings of LRQK")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores for each engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record per prompt and engine")
    return parser.parse_args()


def make_prompts(model: str, count: int, length: int) -> list[list[int]]:
    """Token ids. Of every other prompt the last quarter repeats its beginning."""
    from transformers import AutoTokenizer

    from vllm_lrqk.calibration.texts import standard_library

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts: list[list[int]] = []
    for text in standard_library():
        ids = tokenizer.encode(text[: 20 * length], verbose=False)
        if len(ids) < length:
            continue
        repeated = length // 4 if len(prompts) % 2 == 0 else 0
        prompts.append(ids[: length - repeated] + ids[:repeated])
        if len(prompts) == count:
            break
    return prompts


def run_engine(connection: Any, backend: str, is_drafting: bool, arguments: argparse.Namespace) -> None:
    """Child process: one engine; answers token ids until all is done."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{arguments.threads - 1}"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = arguments.length + arguments.tokens + 8
    settings: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 29}
    if backend == "LRQK":
        settings = {"additional_config": {"lrqk": {"host_memory_gib": 0.5, **arguments.lrqk}}}
    if is_drafting:
        drafts = {"method": "ngram", "num_speculative_tokens": arguments.drafts, "prompt_lookup_max": 4}
        settings["speculative_config"] = drafts
    llm = LLM(
        model=arguments.model,
        attention_backend=backend,
        dtype=arguments.dtype,
        max_model_len=longest,
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
        **settings,
    )

    def counts() -> dict[str, float]:
        values = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
        return {name: values.get(metric, 0.0) for name, metric in COUNTS.items()}

    def generate(ids: list[int], tokens: int) -> tuple[float, Any]:
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=2, detokenize=False)
        started = time.perf_counter()
        output = llm.generate([TokensPrompt(prompt_token_ids=ids)], parameters, use_tqdm=False)[0].outputs[0]
        return time.perf_counter() - started, output

    connection.send("ready")
    while (ids := connection.recv()) is not None:
        generate(ids, 1)  # the prompt is in the prefix cache from here on
        first, _ = generate(ids, 1)
        before = counts()
        seconds, output = generate(ids, arguments.tokens)
        gaps = []
        for position in output.logprobs:
            best = sorted((entry.logprob for entry in position.values()), reverse=True)
            gaps.append(best[0] - best[1])
        found = {name: value - before[name] for name, value in counts().items()}
        connection.send({"tokens": list(output.token_ids), "gaps": gaps, "seconds": seconds - first, **found})
    llm.llm_engine.engine_core.shutdown()


class Engine:
    """An engine in a child process."""

    def __init__(self, backend: str, is_drafting: bool, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=run_engine, args=(other, backend, is_drafting, arguments))
        self.process.start()
        assert self.connection.recv() == "ready"

    def answer(self, ids: list[int]) -> dict[str, Any]:
        self.connection.send(ids)
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join(timeout=60)


@dataclass(frozen=True)
class Summary:
    """One backend with speculation, against the same without."""

    same: int
    gaps: list[float]
    """At the first token that differs, of each answer that does."""
    acceptance: float
    interval: tuple[float, float]
    """95 %, bootstrap over prompts."""
    speed: list[float]
    """Times as fast, of every prompt."""


def summarize(plain: Sequence[dict[str, Any]], drafting: Sequence[dict[str, Any]]) -> Summary:
    """Compare answers in the same order."""
    import numpy

    gaps = []
    for one, other in zip(plain, drafting):
        if one["tokens"] != other["tokens"]:
            at = next(i for i, pair in enumerate(zip(one["tokens"], other["tokens"])) if pair[0] != pair[1])
            gaps.append(one["gaps"][at])
    drafted, accepted = (numpy.array([record[name] for record in drafting]) for name in ("drafted", "accepted"))
    drawn = numpy.random.default_rng(0).integers(0, len(drafted), (10_000, len(drafted)))
    shares = accepted[drawn].sum(1) / numpy.maximum(drafted[drawn].sum(1), 1)
    low, high = numpy.percentile(shares, [2.5, 97.5])
    acceptance = float(accepted.sum() / max(drafted.sum(), 1))
    speed = [one["seconds"] / other["seconds"] for one, other in zip(plain, drafting)]
    return Summary(len(plain) - len(gaps), gaps, acceptance, (float(low), float(high)), speed)


def show(records: dict[tuple[str, bool], list[dict[str, Any]]], tokens: int) -> None:
    table = Table(title="n-gram speculation")
    headings = (
        "backend",
        "same answers",
        "gaps",
        "acceptance",
        "interval",
        "tokens/s without",
        "with",
        "speed",
        "range",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for backend in BACKENDS:
        plain, drafting = records[backend, False], records[backend, True]
        found = summarize(plain, drafting)
        rates = [(tokens - 1) / statistics.median(r["seconds"] for r in of) for of in (plain, drafting)]
        table.add_row(
            backend,
            f"{found.same} of {len(plain)}",
            ", ".join(f"{gap:.1e}" for gap in found.gaps) or "-",
            f"{found.acceptance:.3f}",
            f"{found.interval[0]:.3f} to {found.interval[1]:.3f}",
            *(f"{rate:.1f}" for rate in rates),
            f"{statistics.median(found.speed):.2f}x",
            f"{min(found.speed):.2f} to {max(found.speed):.2f}",
        )
    Console(width=150).print(table)


def main() -> None:
    arguments = parse_arguments()
    prompts = make_prompts(arguments.model, arguments.prompts, arguments.length)
    keys = [(backend, is_drafting) for backend in BACKENDS for is_drafting in (False, True)]
    engines = {}
    records: dict[tuple[str, bool], list[dict[str, Any]]] = {key: [] for key in keys}
    try:
        for key in tqdm(keys, desc="starting"):
            engines[key] = Engine(*key, arguments)
        for ids in tqdm(prompts, desc="prompts"):
            for key, engine in engines.items():
                records[key].append(engine.answer(ids))
    finally:
        for engine in engines.values():
            engine.stop()
    show(records, arguments.tokens)
    if arguments.json:
        rows = [{"backend": key[0], "is_drafting": key[1], **record} for key in keys for record in records[key]]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
