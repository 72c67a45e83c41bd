"""Prefill and decode tokens/s of LRQK against vLLM's own CPU backend, through `LLM()`, in one run.

    python benchmarks/serve_cpu.py [--lengths 16384 65536] [--layers 4] [--batch 1] [--threads 2] [--json FILE]

Both engines are alive at once, each in a process of its own, and take turns on the same cores, so that what
else the machine does meets both. The model is random and attention-bound: the share of attention in a step
is what a real model has at some longer context. Prefill is the time to the first token of a prompt that no
cache knows; decode is the time of further tokens after a prompt that the prefix cache holds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

BACKENDS = {"lrqk": "LRQK", "cpu_attn": "CPU_ATTN"}
VOCAB_SIZE = 512


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536], help="prompt tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="requests decoded together")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores for each engine")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per measurement")
    parser.add_argument("--repeats", type=int, default=3, help="decode measurements per case; the median counts")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--lrqk", type=json.loads, default={}, help="settings of LRQK as JSON")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--plot", type=Path, help="write a plot to this file (needs matplotlib)")
    return parser.parse_args()


def make_model(folder: Path, arguments: argparse.Namespace) -> Path:
    """A random Llama with small matrices and the attention shape asked for."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.head_size,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_engine(connection: Any, model: str, backend: str, arguments: argparse.Namespace) -> None:
    """Child process: one engine; answers (length, batch, seed, tokens) with seconds until all is done."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{arguments.threads - 1}"
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(arguments.lengths) + arguments.tokens + 8
    kv_bytes = (
        2 * arguments.layers * arguments.kv_heads * arguments.head_size * getattr(torch, arguments.dtype).itemsize
    )
    pool = int(kv_bytes * (longest + 1024) * max(arguments.batch) * 1.1)
    settings: dict[str, Any] = {"kv_cache_memory_bytes": pool}
    if backend == "lrqk":
        settings = {"additional_config": {"lrqk": {"host_memory_gib": pool / 2**30, **arguments.lrqk}}}
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        attention_backend=BACKENDS[backend],
        dtype=arguments.dtype,
        max_model_len=longest,
        max_num_seqs=max(arguments.batch),
        enforce_eager=True,
        **settings,
    )
    if backend == "lrqk":
        counted = llm.collective_rpc("lrqk_counters")[0]
        assert set(counted["implementations"].values()) == {"LRQKImpl"}, counted
    connection.send("ready")
    while (order := connection.recv()) is not None:
        length, batch, seed, tokens = order
        prompts = []
        for i in range(batch):
            generator = torch.Generator().manual_seed(1000 * seed + i)
            ids = torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()
            prompts.append(TokensPrompt(prompt_token_ids=ids))
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, parameters, use_tqdm=False)
        connection.send(time.perf_counter() - started)
    llm.llm_engine.engine_core.shutdown()


class Engine:
    """An engine in a child process."""

    def __init__(self, model: Path, backend: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=run_engine, args=(other, str(model), backend, arguments))
        self.process.start()
        assert self.connection.recv() == "ready"

    def seconds(self, length: int, batch: int, seed: int, tokens: int) -> float:
        self.connection.send((length, batch, seed, tokens))
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join(timeout=60)


def measure(engines: dict[str, Engine], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of every case, the engines taking turns."""
    records = []
    cases = [(length, batch) for length in arguments.lengths for batch in arguments.batch]
    with tqdm(total=len(cases) * 2 * (1 + 2 * arguments.repeats), desc="measuring") as bar:
        for seed, (length, batch) in enumerate(cases):
            prefill, decode = {}, {name: [] for name in engines}
            for name, engine in engines.items():
                prefill[name] = engine.seconds(length, batch, seed, 1)
                bar.update()
            for _ in range(arguments.repeats):
                for name, engine in engines.items():
                    first = engine.seconds(length, batch, seed, 1)
                    decode[name].append(engine.seconds(length, batch, seed, 1 + arguments.tokens) - first)
                    bar.update(2)
            for name in engines:
                common = {"length": length, "batch": batch, "threads": arguments.threads, "backend": name}
                records.append({**common, "phase": "prefill", "tokens_per_s": length * batch / prefill[name]})
                decode_rate = arguments.tokens * batch / statistics.median(decode[name])
                records.append({**common, "phase": "decode", "tokens_per_s": decode_rate})
    return records


def show(records: list[dict[str, Any]]) -> None:
    table = Table(title="tokens/s through LLM()")
    for heading in ("phase", "length", "batch", "LRQK", "CPU_ATTN", "ratio"):
        table.add_column(heading, justify="right")
    for record in records:
        if record["backend"] != "lrqk":
            continue
        key = {k: record[k] for k in ("length", "batch", "phase")}
        other = next(r for r in records if r["backend"] == "cpu_attn" and all(r[k] == v for k, v in key.items()))
        ours, theirs = record["tokens_per_s"], other["tokens_per_s"]
        row = (key["phase"], f"{key['length']:,}", str(key["batch"]), f"{ours:,.1f}", f"{theirs:,.1f}")
        table.add_row(*row, f"{ours / theirs:.2f}x")
    Console().print(table)


def plot(records: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, phase in zip(axes, ("prefill", "decode")):
        for backend in BACKENDS:
            for batch in sorted({r["batch"] for r in records}):
                points = [r for r in records if (r["backend"], r["phase"], r["batch"]) == (backend, phase, batch)]
                label = f"{backend}, batch {batch}"
                axis.plot([r["length"] for r in points], [r["tokens_per_s"] for r in points], "o-", label=label)
        axis.set(title=phase, xlabel="context (tokens)", ylabel="tokens/s", xscale="log", yscale="log")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"), arguments)
        engines = {name: Engine(model, name, arguments) for name in BACKENDS}
        try:
            records = measure(engines, arguments)
        finally:
            for engine in engines.values():
                engine.stop()
    show(records)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()
