"""Triton's interpreter: where there is no GPU, conftest.py sets TRITON_INTERPRET, and kernels run on CPU tensors."""

import importlib
import os
from types import ModuleType

import pytest


def interpreted_kernels(module: str) -> ModuleType:
    """A module whose Triton kernels are interpreted; skips the calling test module elsewhere.

    Args:
        module: below the package, such as "devices.triton_parts".
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here; tests/gpu covers it", allow_module_level=True)
    return importlib.import_module(f"vllm_lrqk.{module}")
