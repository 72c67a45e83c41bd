"""Engines on the CPU platform with Model Runner V2, the CUDA step path and interpreted Triton; prints JSON lines.

Its own process: vLLM looks for Triton's backends when it is imported, and the CPU has none, so one is named here.
What stands in for a GPU beside the emulated and interpreted kernels: the sampler warms up greedily, without grammars,
and the CPU platform, which switches asynchronous scheduling off, is told to leave it on.

    python tests/support/model_runner_v2.py MODEL_FOLDER < {"settings": ..., "prompts": ..., ...}
"""

import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import triton.backends

triton.backends.backends["cpu"] = types.SimpleNamespace(  # type: ignore[assignment]
    driver=types.SimpleNamespace(is_active=lambda: True), compiler=None
)

import torch  # noqa: E402

torch.set_num_threads(1)
torch.accelerator.synchronize = lambda *args: None  # vLLM's warm-up calls it

from emulated import emulated_operators  # noqa: E402
from engines import counters, engine, greedy, scheduler  # noqa: E402
from host_attention import prompt_attention  # noqa: E402

from vllm_lrqk import devices  # noqa: E402
from vllm_lrqk.core.prefill import flash_attention  # noqa: E402
from vllm_lrqk.devices import cuda_prefill  # noqa: E402


def use_emulated_device() -> None:
    operators = emulated_operators()
    devices.cuda_operators = lambda device: operators
    cuda_prefill.default_attention = lambda: flash_attention  # type: ignore[assignment]
    cuda_prefill.default_prompt_attention = lambda: prompt_attention


def allow_asynchronous_scheduling(is_wanted: list[bool]) -> None:
    import vllm.platforms

    platform = type(vllm.platforms.current_platform)
    original = platform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = is_wanted[0]

    platform.check_and_update_config = classmethod(check_and_update_config)  # type: ignore[assignment]


def flush(worker: Any) -> None:
    """Let the runner forget finished requests, as it would with the next step."""
    from vllm.v1.core.sched.output import SchedulerOutput

    finished = SchedulerOutput.make_empty()
    finished.finished_req_ids = set(worker.model_runner.req_states.req_id_to_index)
    worker.execute_model(finished)


def warm_up(worker: Any) -> dict[str, Any]:
    """vLLM's own warm-up of kernels and of mixed batches."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu import warmup

    SamplingParams.for_sampler_warmup = classmethod(  # type: ignore[attr-defined]
        lambda cls: cls(temperature=0, max_tokens=20)
    )
    runner, steps = worker.model_runner, []
    flush(worker)

    def execute(scheduled: Any) -> Any:
        steps.append(dict(scheduled.num_scheduled_tokens))
        return worker.execute_model(scheduled)

    sample: Callable[[Any], Any] = lambda grammar: worker.sample_tokens(None)  # noqa: E731
    warmup.warmup_kernels(runner, execute, sample)
    mixed = warmup.run_mixed_prefill_decode_warmup(runner, execute, sample, 16)
    return {"is_mixed": mixed, "steps": len(steps), "most_requests": max(map(len, steps))}


def capture(worker: Any) -> list[dict[str, Any]]:
    """Forward passes with the metadata that vLLM captures graphs with: (full, requests, tokens)."""
    from vllm.forward_context import set_forward_context
    from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

    runner, found = worker.model_runner, []
    for full, requests, tokens in ((True, 3, 3), (True, 1, 1), (False, 3, 20), (False, 3, 3)):
        state = prepare_inputs_to_capture(
            requests,
            tokens,
            runner.model_state,
            runner.input_buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=full,
            max_query_len=1 if full else None,
        )
        step = next(iter(state.attn_metadata.values()))
        buffers, context = runner.input_buffers, {"num_tokens": tokens, "slot_mapping": state.slot_mappings}
        with torch.inference_mode(), set_forward_context(state.attn_metadata, runner.vllm_config, **context):
            output = runner.model(
                input_ids=buffers.input_ids[:tokens],
                positions=buffers.positions[:tokens],
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        found.append(
            {
                "full": full,
                "decodes": step.num_decodes,
                "prefill": len(step.prefill),
                "lens": step.seq_lens.tolist(),
                "is_finite": bool(torch.isfinite(output).all()),
            }
        )
    return found


def facts_of(llm: Any) -> dict[str, Any]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    counted = counters(llm)
    return {
        "runner": type(worker.model_runner).__mro__[1].__module__,
        "decoders": sorted({type(layer.impl.layer.decoder).__name__ for layer in layers if hasattr(layer, "impl")}),
        "scheduler": type(scheduler(llm)).__name__,
        "counters": {name: counted[name] for name in ("decode_tokens", "pages_sealed", "rows_hit", "rows_missed")},
    }


def main() -> None:
    from vllm import TokensPrompt

    plan = json.load(sys.stdin)
    use_emulated_device()
    is_asynchronous = [False]
    allow_asynchronous_scheduling(is_asynchronous)

    def prompts(name: str) -> list[Any]:
        return [TokensPrompt(prompt_token_ids=tokens) for tokens in plan[name]]

    def tokens(llm: Any, asked: list[Any], count: int) -> list[list[int]]:
        llm.reset_prefix_cache()
        return [list(output.token_ids) for output in greedy(llm, asked, count)]

    def say(name: str, **facts: Any) -> None:
        print("RESULT", json.dumps({"name": name, **facts}), flush=True)

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    for name, settings, batches, asked, count_name in (
        ("first runner", "settings", "batches", "prompts", "count"),
        ("first runner, roomy", "roomy", "tight_batches", "shared", "tight_count"),
    ):
        with engine(sys.argv[1], plan[settings], **plan[batches]) as llm:
            say(name, tokens=tokens(llm, prompts(asked), plan[count_name]), **facts_of(llm))
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    with engine(sys.argv[1], plan["settings"], **plan["batches"]) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        say("plain", tokens=tokens(llm, prompts("prompts"), plan["count"]), **facts_of(llm))
        say("warm_up", did=warm_up(worker), tokens=tokens(llm, prompts("prompts"), plan["count"]))
        say("capture", did=capture(worker), tokens=tokens(llm, prompts("prompts"), plan["count"]))
    is_asynchronous[0] = True
    with engine(sys.argv[1], plan["tight"], **plan["tight_batches"]) as llm:
        preempted: list[Any] = []
        preempt = scheduler(llm)._preempt_request

        def count(*args: Any, **kwargs: Any) -> Any:
            preempted.append(args[0].request_id)
            return preempt(*args, **kwargs)

        scheduler(llm)._preempt_request = count
        answers = tokens(llm, prompts("shared"), plan["tight_count"])
        say("asynchronous", tokens=answers, preempted=len(preempted), **facts_of(llm))
        manager, cached = scheduler(llm).kv_cache_manager, []
        find = manager.get_computed_blocks

        def computed(*args: Any, **kwargs: Any) -> Any:
            found = find(*args, **kwargs)
            cached.append(found[1])
            return found

        manager.get_computed_blocks = computed
        again = greedy(llm, prompts("shared")[1:2], 6)[0]
        say("cached", tokens=[list(again.token_ids)], cached_tokens=max(cached))


if __name__ == "__main__":
    main()
