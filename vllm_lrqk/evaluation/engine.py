"""One vLLM engine in a child process of its own."""

import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation.errors import EvaluationError

COUNTED = ("decode_tokens", "rows_attended", "rows_hit", "rows_missed")


@dataclass(frozen=True)
class Request:
    """Tokens for an engine: a prompt, tokens that its decode steps must take, and how many it may choose after."""

    token_ids: list[int]
    forced_ids: list[int]
    free_tokens: int
    stop_ids: list[int]


@dataclass(frozen=True)
class Output:
    """`token_ids` of all decode steps, forced ones first; `logprobs` of them where no token was free."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Batch:
    """Outputs in the order of the requests, and what attention did for all of them."""

    outputs: list[Output]
    counts: dict[str, int]
    """Sums over ranks, layers, KV heads and requests, by the names in `COUNTED`; empty for dense attention."""


class Engine:
    """An engine that answers batches until it is closed; its own output goes to `log`."""

    def __init__(self, settings: dict[str, Any], is_lrqk: bool, log: Path) -> None:
        """Start the engine with the arguments `settings` of `LLM`. Raises EvaluationError if vLLM refuses."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._log = log
        self._process = context.Process(target=_serve, args=(other, settings, is_lrqk, str(log)))
        self._process.start()
        other.close()
        self.about: dict[str, Any] = self._receive()
        """`device_bytes_per_token` and `kv_heads` of one rank."""

    def answer(self, requests: list[Request]) -> Batch:
        """Greedy continuations of all requests, computed together."""
        self._connection.send(requests)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            try:
                self._connection.send(None)
            except OSError:
                self._process.terminate()
            self._process.join(timeout=60)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join(timeout=60)
            raise EvaluationError(
                f"The engine's process ended with code {self._process.exitcode}; {self._log} says why "
                "(code -9: memory ran out, lower --batch or --lengths)."
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Any, settings: dict[str, Any], is_lrqk: bool, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
    try:
        llm = _start(settings, is_lrqk)
        connection.send(_about(llm))
        while (requests := connection.recv()) is not None:
            connection.send(_answer(llm, requests, is_lrqk))
        llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        errors = error.errors() if hasattr(error, "errors") else []
        text = errors[0]["msg"].removeprefix("Value error, ") if errors else str(error) or type(error).__name__
        connection.send(EvaluationError(f"vLLM: {text.strip()} ({log} has the rest.)"))
        raise


def _start(settings: dict[str, Any], is_lrqk: bool) -> Any:
    from vllm import LLM

    llm = LLM(
        skip_tokenizer_init=True,
        logits_processors=["vllm_lrqk.evaluation.forced:ForcedTokens"],
        worker_extension_cls="vllm_lrqk.integration.worker.WorkerExtension",
        **({"attention_backend": "LRQK"} if is_lrqk else {}),
        **settings,
    )
    for rank in llm.collective_rpc("lrqk_counters"):
        found = set(rank["implementations"].values())
        if ("LRQKImpl" in found) != is_lrqk or (is_lrqk and len(found) > 1):
            raise EvaluationError(f"the layers run {', '.join(sorted(found))}, which is not what was asked for.")
    return llm


def _about(llm: Any) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    device_bytes = llm.collective_rpc("lrqk_counters")[0]["device_bytes_per_token"]
    kv_heads = model.get_num_kv_heads(parallel)
    if not device_bytes:
        layers = model.get_num_layers(parallel)
        device_bytes = 2 * layers * kv_heads * model.get_head_size() * model.dtype.itemsize
    return {"device_bytes_per_token": device_bytes, "kv_heads": kv_heads, "dtype": str(model.dtype)}


def _answer(llm: Any, requests: list[Request], is_lrqk: bool) -> Batch:
    from vllm import SamplingParams, TokensPrompt

    from vllm_lrqk.evaluation.forced import FORCED_TOKENS

    before = _counts(llm)
    results = llm.generate(
        [TokensPrompt(prompt_token_ids=request.token_ids) for request in requests],
        [
            SamplingParams(
                temperature=0,
                max_tokens=len(request.forced_ids) + request.free_tokens,
                min_tokens=len(request.forced_ids),
                logprobs=None if request.free_tokens else 0,
                stop_token_ids=request.stop_ids if request.free_tokens else [],
                ignore_eos=not request.free_tokens,
                extra_args={FORCED_TOKENS: request.forced_ids},
                detokenize=False,
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    outputs = []
    for request, result in zip(requests, results):
        ids = list(result.outputs[0].token_ids)
        if ids[: len(request.forced_ids)] != request.forced_ids:
            raise EvaluationError("vLLM did not take the tokens that a request was made to take.")
        logprobs = [step[token].logprob for token, step in zip(ids, result.outputs[0].logprobs or [])]
        outputs.append(Output(ids, logprobs))
    after = _counts(llm)
    return Batch(outputs, {name: after[name] - before[name] for name in COUNTED} if is_lrqk else {})


def _counts(llm: Any) -> dict[str, int]:
    ranks = llm.collective_rpc("lrqk_counters")
    return {name: sum(rank[name] for rank in ranks) for name in COUNTED}
