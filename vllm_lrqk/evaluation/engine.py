"""One vLLM engine in a child process of its own."""

import multiprocessing
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation.distributions import Distributions, create_divergences, take_divergences
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.methods import METHODS

COUNTED = ("decode_tokens", "rows_attended", "rows_hit", "rows_missed")


@dataclass(frozen=True)
class Request:
    """Tokens for an engine: a prompt, tokens that its decode steps must take, and how many it may choose after."""

    token_ids: list[int]
    forced_ids: list[int]
    free_tokens: int
    stop_ids: list[int]
    distributions: Path | None = None
    """File of the forced steps' distributions: dense attention writes it, other methods are compared with it."""


@dataclass(frozen=True)
class Output:
    """`token_ids` of all decode steps, forced ones first; `logprobs` of them where no token was free."""

    token_ids: list[int]
    logprobs: list[float]
    divergences: list[float] = field(default_factory=list)
    """Kullback-Leibler divergence from dense attention of each forced step, in nats, where it was asked for."""


@dataclass(frozen=True)
class Batch:
    """Outputs in the order of the requests, and what attention did for all of them."""

    outputs: list[Output]
    counts: dict[str, int]
    """Sums over ranks, layers, KV heads and requests, by those names of `COUNTED` that the method counts."""


class Engine:
    """An engine that answers batches until it is closed; its own output goes to `log`."""

    def __init__(self, settings: dict[str, Any], backend: str | None, log: Path) -> None:
        """Start the engine with the arguments `settings` of `LLM`; `backend` None is dense attention.

        Raises EvaluationError if vLLM refuses.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._log = log
        self._process = context.Process(target=_serve, args=(other, settings, backend, str(log)))
        self._process.start()
        other.close()
        self.about: dict[str, Any] = self._receive()
        """`device_bytes_per_token`, `device_bytes_per_request` and `kv_heads` of one rank."""

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


def _serve(connection: Any, settings: dict[str, Any], backend: str | None, log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is the engine's own already
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # ForcedTokens is a logits processor of V1, which V2 refuses
    try:
        llm = _start(settings, backend)
        connection.send(_about(llm, backend))
        while (requests := connection.recv()) is not None:
            connection.send(_answer(llm, requests, backend))
        llm.llm_engine.engine_core.shutdown()
    except Exception as error:
        errors = error.errors() if hasattr(error, "errors") else []
        text = errors[0]["msg"].removeprefix("Value error, ") if errors else str(error) or type(error).__name__
        connection.send(EvaluationError(f"vLLM: {text.strip()} ({log} has the rest.)"))
        raise


def _start(settings: dict[str, Any], backend: str | None) -> Any:
    from vllm import LLM

    llm = LLM(
        skip_tokenizer_init=True,
        logits_processors=["vllm_lrqk.evaluation.forced:ForcedTokens"],
        worker_extension_cls="vllm_lrqk.integration.worker.WorkerExtension",
        **({} if backend is None else {"attention_backend": backend}),
        **settings,
    )
    for rank in llm.collective_rpc("lrqk_counters"):
        found = set(rank["implementations"].values())
        if not is_asked_for(found, backend, num_windows(llm.llm_engine.vllm_config.model_config.hf_text_config) > 0):
            raise EvaluationError(f"the layers run {', '.join(sorted(found))}, which is not what was asked for.")
    return llm


def is_asked_for(implementations: set[str], backend: str | None, has_windows: bool) -> bool:
    """Whether the classes of the layers are the backend's, sliding windows aside; for None, no method's."""
    ours = {found for found in implementations if found in {f"{name}Impl" for name in METHODS}}
    if backend is None:
        return not ours
    return ours == {f"{backend}Impl"} and (has_windows or ours == implementations)


def num_windows(config: Any) -> int:
    """Layers of a text model that attend to a sliding window."""
    return (getattr(config, "layer_types", None) or []).count("sliding_attention")


def _about(llm: Any, backend: str | None) -> dict[str, Any]:
    config = llm.llm_engine.vllm_config
    model, parallel = config.model_config, config.parallel_config
    kv_heads = model.get_num_kv_heads(parallel)
    if backend is None:
        layer_bytes = 2 * kv_heads * model.get_head_size() * model.dtype.itemsize
        per_token, per_request = dense_bytes(model.hf_text_config, model.get_num_layers(parallel), layer_bytes)
    else:
        rank = llm.collective_rpc("lrqk_counters")[0]
        per_token, per_request = rank["device_bytes_per_token"], rank["device_bytes_per_request"]
    return {
        "device_bytes_per_token": per_token,
        "device_bytes_per_request": per_request,
        "kv_heads": kv_heads,
        "vocabulary": model.get_vocab_size(),
    }


def dense_bytes(config: Any, num_layers: int, layer_bytes: int) -> tuple[int, int]:
    """What dense attention keeps per token, and per request beside: sliding windows once they are full.

    Args:
        layer_bytes: a token's key and value in one layer.
    """
    windows = num_windows(config)
    window_tokens = getattr(config, "sliding_window", None) or 0
    return (num_layers - windows) * layer_bytes, windows * window_tokens * layer_bytes


def _answer(llm: Any, requests: list[Request], backend: str | None) -> Batch:
    from vllm import TokensPrompt

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    before = _counts(llm)
    results = llm.generate(
        [TokensPrompt(prompt_token_ids=request.token_ids) for request in requests],
        [_sampling(request, backend, vocabulary) for request in requests],
        use_tqdm=False,
    )
    outputs = []
    for request, result in zip(requests, results):
        ids = list(result.outputs[0].token_ids)
        if ids[: len(request.forced_ids)] != request.forced_ids:
            raise EvaluationError("vLLM did not take the tokens that a request was made to take.")
        ids = _until_stop(ids, request)
        logprobs = [step[token].logprob for token, step in zip(ids, result.outputs[0].logprobs or [])]
        outputs.append(Output(ids, logprobs, _divergences(request, backend)))
    after = _counts(llm)
    return Batch(outputs, {name: after[name] - before[name] for name in after} if backend else {})


def _sampling(request: Request, backend: str | None, vocabulary: int) -> Any:
    from vllm import SamplingParams

    from vllm_lrqk.evaluation.forced import DISTRIBUTIONS, DIVERGENCES, FORCED_TOKENS

    # vLLM ends a request at a stop token even before min_tokens; a chat's marks among the forced tokens may be one.
    stops = request.free_tokens > 0 and not set(request.stop_ids) & set(request.forced_ids)
    extra: dict[str, Any] = {FORCED_TOKENS: request.forced_ids}
    if request.distributions is not None:
        extra[DISTRIBUTIONS] = str(request.distributions)
        if backend is None:
            Distributions.create(request.distributions, len(request.forced_ids), vocabulary)
        else:
            extra[DIVERGENCES] = str(_divergence_file(request.distributions))
            create_divergences(_divergence_file(request.distributions), len(request.forced_ids))
    return SamplingParams(
        temperature=0,
        max_tokens=len(request.forced_ids) + request.free_tokens,
        min_tokens=len(request.forced_ids),
        logprobs=None if request.free_tokens else 0,
        stop_token_ids=request.stop_ids if stops else [],
        ignore_eos=not stops,
        extra_args=extra,
        detokenize=False,
    )


def _until_stop(ids: list[int], request: Request) -> list[int]:
    """Output tokens up to and with the first stop token that was not forced."""
    for position in range(len(request.forced_ids), len(ids)):
        if ids[position] in request.stop_ids:
            return ids[: position + 1]
    return ids


def _divergence_file(distributions: Path) -> Path:
    return distributions.with_suffix(".divergence.npy")


def _divergences(request: Request, backend: str | None) -> list[float]:
    file = request.distributions
    if file is None:
        return []
    if backend is None:
        Distributions(file, "r").check(file)
        return []
    return take_divergences(_divergence_file(file))


def _counts(llm: Any) -> dict[str, int]:
    ranks = llm.collective_rpc("lrqk_counters")
    return {name: sum(rank[name] for rank in ranks) for name in COUNTED if all(name in rank for rank in ranks)}
