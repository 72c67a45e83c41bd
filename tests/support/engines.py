"""Real vLLM engines for tests: started in this process, proven to run LRQK, and left without a block in use."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
_alive = 0


def tiny_llama(
    folder: Path,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_size: int = 64,
    num_layers: int = 2,
    vocab_size: int = 512,
) -> Path:
    """A random Llama whose next token is decided clearly enough that two exact kernels agree on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"llama-{num_heads}-{num_kv_heads}-{head_size}-{num_layers}"
    if path.exists():
        return path
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=num_heads * 16,
            intermediate_size=128,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_size,
            max_position_embeddings=65536,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    # Large queries and keys give attention that depends on content, a large head clear decisions.
    _draw(model, {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 4.0})
    model.save_pretrained(path)
    return path


def tiny_gemma3(folder: Path, window: int = 48, full: tuple[int, ...] = (1, 4)) -> Path:
    """A random Gemma 3 of six layers, of which `full` attend to all tokens, that decides as clearly as `tiny_llama`."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    path = folder / f"gemma3-{window}-{'-'.join(map(str, full))}"
    if path.exists():
        return path
    torch.manual_seed(0)
    kinds = ["full_attention" if layer in full else "sliding_attention" for layer in range(6)]
    config = _tiny_windows(window, 6) | {"query_pre_attn_scalar": 64, "layer_types": kinds}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**config))
    _draw(model, {"q_proj": 2.0, "k_proj": 2.0, "embed_tokens": 1.0}, post_attention=15.0)
    model.save_pretrained(path)
    return path


def tiny_gemma2(folder: Path, window: int = 48) -> Path:
    """A random Gemma 2 of four layers, every other one with a window, whose soft cap bends most attention logits."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    path = folder / f"gemma2-{window}"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = _tiny_windows(window, 4) | {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0}
    model = Gemma2ForCausalLM(Gemma2Config(**config))
    _draw(model, {"q_proj": 3.0, "k_proj": 3.0, "embed_tokens": 1.0}, post_attention=15.0)
    model.save_pretrained(path)
    return path


def tiny_gpt_oss(folder: Path, window: int = 48) -> Path:
    """A random gpt-oss of four layers, every other one with a window, with sinks of much weight."""
    from transformers import GptOssConfig, GptOssForCausalLM

    path = folder / f"gpt-oss-{window}"
    if path.exists():
        return path
    torch.manual_seed(0)
    config = _tiny_windows(window, 4) | {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None}
    model = GptOssForCausalLM(GptOssConfig(**config, tie_word_embeddings=False))
    _draw(model, {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 4.0, "lm_head": 4.0})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_(4.0, 1.0)
            elif "experts" in name or name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(path)
    return path


def _tiny_windows(window: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 65536,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }


def _draw(model: Any, gains: dict[str, float], post_attention: float | None = None) -> None:
    """Random matrices, with gains by the last part of a name.

    Args:
        post_attention: of norms behind attention; a large one lets what is attended to outweigh the token itself.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, gains.get(name.split(".")[-2], 1.0) / parameter.shape[-1] ** 0.5)
            elif post_attention is not None and "post_attention" in name:
                parameter.fill_(post_attention)


@contextmanager
def engine(
    model: Path, values: dict[str, Any] | None = None, method: str = "LRQK", has_windows: bool = False, **settings: Any
) -> Iterator[Any]:
    """An `LLM` of a method with the given values of its settings; None gives vLLM's own CPU backend.

    At the end every block must be free again, and every layer must have been served by what was asked for; where
    `has_windows`, those with a sliding window by the package's own backend for them.
    """
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.3,  # of which vLLM asks that it is free at the start; pools have sizes of their own
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if values is None:
        defaults |= {"attention_backend": "CPU_ATTN", "kv_cache_memory_bytes": 512 * MIB}
    else:
        common = {"page_size": 64, "host_memory_gib": 0.25} if method == "LRQK" else {}
        defaults |= {"attention_backend": method, "additional_config": {method.lower(): common | values}}
    global _alive
    llm = LLM(model=str(model), **(defaults | settings))
    _alive += 1
    try:
        yield llm
        windows = {"WindowImpl"} if has_windows else set()
        assert_backend(llm, {"CPUAttentionBackendImpl"} if values is None else {f"{method}Impl"} | windows)
        assert_nothing_in_use(llm)
    finally:
        _alive -= 1
        shut_down(llm)


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def counters(llm: Any) -> dict[str, Any]:
    """Counters of the first rank."""
    return llm.collective_rpc("lrqk_counters")[0]


def assert_backend(llm: Any, implementations: set[str]) -> None:
    """The attention layers run `implementations`: the live objects, not the flag."""

    def names(worker: Any) -> set[str]:
        layers = worker.vllm_config.compilation_config.static_forward_context
        return {type(layer.impl).__name__ for layer in layers.values() if hasattr(layer, "impl")}

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    found = names(executor.driver_worker.worker)
    assert found == implementations, found


def assert_nothing_in_use(llm: Any) -> None:
    """No request holds a block, and every block is free."""
    manager = scheduler(llm).kv_cache_manager
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # all but the null block
    for group in manager.coordinator.single_type_managers:
        assert not group.req_to_blocks, group.req_to_blocks
        assert not group.num_cached_block
        if group.block_pool is not pool:
            assert group.block_pool.get_num_free_blocks() == group.block_pool.num_gpu_blocks - 1
        spare = getattr(group, "spare_pool", None)
        if spare is not None:
            assert spare.get_num_free_blocks() == spare.num_gpu_blocks - 1


def shut_down(llm: Any) -> None:
    """End an engine so that the next one can start in the same process.

    vLLM's process groups end with it: an engine that is still alive serves again only after another has started.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    if _alive == 0:
        cleanup_dist_env_and_memory()


def token_prompts(lengths: list[int], vocab_size: int = 512, seed: int = 0, shared: int = 0) -> list[Any]:
    """Random prompts; the first `shared` tokens of all are the same."""
    from vllm import TokensPrompt

    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(0, vocab_size, (count,), generator=generator).tolist()

    prefix = draw(shared)
    return [TokensPrompt(prompt_token_ids=(prefix + draw(length))[:length]) for length in lengths]


def greedy(llm: Any, prompts: list[Any], max_tokens: int, logprobs: int | None = None) -> list[Any]:
    """Greedy continuations: vLLM's completion outputs, one per prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=logprobs, detokenize=False
    )
    return [result.outputs[0] for result in llm.generate(prompts, parameters, use_tqdm=False)]
