"""Pretrained models for tests marked `real_model`: fetched once into the user's cache, or a reason to skip."""

from pathlib import Path

import pytest
from get_model import ModelError, get_model


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder."""
    try:
        return get_model("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")


@pytest.fixture(scope="session")
def gemma3_folder() -> Path:
    """Gemma 3 270M as a Hugging Face folder."""
    try:
        return get_model("gemma3-270m")
    except ModelError as error:
        pytest.skip(f"Gemma 3 is not at hand: {error}")
