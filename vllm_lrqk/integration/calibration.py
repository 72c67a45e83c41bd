"""Calibration inside vLLM's workers: hooks that see the queries, keys and values of every attention layer.

Private names of vLLM 0.32 in use: `RotaryEmbeddingBase._compute_cos_sin_cache`, as the registered table is in the
model's own type; the keyword `positions` of a model's forward, which every model of vLLM has.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_lrqk.core.calibration import ModelIdentity
from vllm_lrqk.core.moments import MomentSums
from vllm_lrqk.core.rotary import RotaryTable
from vllm_lrqk.integration.checks import model_facts
from vllm_lrqk.integration.compat import layer_number

FIXED_FREQUENCIES = (
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "NTKScalingRotaryEmbedding",
    "DynamicNTKScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
)
"""vLLM's RoPE classes whose angles are proportional to one position."""


def rotary_module(model: nn.Module, layer_name: str) -> nn.Module | None:
    """The RoPE beside an attention layer, or None if there is none."""
    parent = model.get_submodule(layer_name.rpartition(".")[0])
    return next((module for module in parent.modules() if isinstance(module, RotaryEmbeddingBase)), None)


def rotary_table(module: nn.Module | None) -> tuple[RotaryTable | None, str]:
    """Cosines and sines of a model's RoPE; or None, and its name, where it cannot be turned back."""
    if module is None:
        return None, "no RoPE"
    name = type(module).__name__
    if name not in FIXED_FREQUENCIES:
        return None, name
    cos_sin = module._compute_cos_sin_cache()
    return RotaryTable.from_cache(cos_sin.to(module.cos_sin_cache.device), bool(module.is_neox_style)), name


class CalibrationExtension:
    """Methods added to vLLM's worker, for `LLM.collective_rpc`."""

    def start_calibration(self, page_size: int) -> dict[str, Any]:
        """Sum the moments of every attention layer from here on.

        Returns:
            The model's identity, the frames of pages, and the names of RoPE forms that cannot be turned back.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        self._moment_sums: dict[str, MomentSums] = {}
        self._hooks = [model.register_forward_pre_hook(self._keep_positions, with_kwargs=True)]
        refused, tables = set(), []
        for name, layer in model.named_modules():
            if not isinstance(layer, Attention):
                continue
            table, rope = rotary_table(rotary_module(model, name))
            if table is None:
                refused.add(rope)
            else:
                tables.append(table)
            device = next(model.parameters()).device
            sums = MomentSums(layer.num_kv_heads, layer.head_size, page_size, table, device)
            self._moment_sums[layer.layer_name] = sums
            self._hooks.append(layer.register_forward_pre_hook(self._count_tokens))
        if any(not table.equals(tables[0]) for table in tables):
            refused.add("a RoPE that differs between layers")
        frames = None if refused else tables[0].every(page_size).to(torch.device("cpu"))
        identity = ModelIdentity.of(model_facts(self.vllm_config))  # type: ignore[attr-defined]
        return {"identity": identity, "refused": sorted(refused), "frames": frames}

    def finish_calibration(self) -> dict[int, dict[str, tuple[torch.Tensor, float]]]:
        """What this rank summed up, by the number of the layer; the hooks are removed."""
        for hook in self._hooks:
            hook.remove()
        return {layer_number(name): sums.sums() for name, sums in self._moment_sums.items()}

    def _keep_positions(self, model: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        self._positions = named["positions"]

    def _count_tokens(self, layer: Any, arguments: tuple) -> None:
        tokens = self._positions.shape[-1]  # M-RoPE has three rows of them
        query, key, value = (vectors[:tokens].view(tokens, -1, layer.head_size) for vectors in arguments[:3])
        self._moment_sums[layer.layer_name].add(query, key, value, self._positions)
