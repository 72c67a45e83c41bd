"""The random model of scripts/gpu_vllm.py."""

import json
from pathlib import Path

GPU_SHAPE = {"hidden": 1024, "heads": 32, "kv_heads": 8, "head_size": 128, "layers": 4, "vocab": 4096}
CPU_SHAPE = {"hidden": 128, "heads": 8, "kv_heads": 2, "head_size": 64, "layers": 2, "vocab": 512}


def write_model(folder: Path, hidden: int, heads: int, kv_heads: int, head_size: int, layers: int, vocab: int) -> None:
    """A random bfloat16 Llama whose next token is decided clearly enough that two exact kernels agree on it."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        # Large queries and keys give attention that depends on content, a large head clear decisions.
        return (torch.randn(rows, columns, generator=generator) * gain / columns**0.5).bfloat16()

    mlp = 4 * hidden
    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "lm_head.weight": matrix(vocab, hidden, 4.0)}
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_size, hidden, 2.0),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_size, hidden, 2.0),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_size, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_size),
            f"{prefix}.mlp.gate_proj.weight": matrix(mlp, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(mlp, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, mlp),
            f"{prefix}.input_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "vocab_size": vocab,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
