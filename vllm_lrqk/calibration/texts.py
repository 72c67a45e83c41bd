"""Text to calibrate on: files that the user names, or the sources of Python's standard library, which are at hand."""

import hashlib
import sysconfig
from collections.abc import Callable
from pathlib import Path

from vllm_lrqk.core.config import ConfigError

HELD_OUT_SHARE = 0.05
"""Of the library's modules, by their names' hashes: those that the small model's perplexity is measured on."""
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_texts(files: list[Path]) -> list[str]:
    """The texts of the files, or of the standard library if none is named.

    Raises:
        ConfigError: a file cannot be read, or there is no standard library to read.
    """
    if not files:
        return standard_library()
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text has {str(file)!r}, which cannot be read ({error}): name UTF-8 files.") from error
    return texts


def standard_library() -> list[str]:
    """Sources of the standard library's modules, the order mixed by their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in root.rglob("*.py"):
        name = file.relative_to(root)
        order = hashlib.sha256(str(name).encode()).digest()
        if not SKIPPED_FOLDERS & set(name.parts) and order[0] >= 256 * HELD_OUT_SHARE:
            found.append((order, file))
    if not found:
        raise ConfigError(f"This Python has no sources of its library in {root}: name texts with --text FILE.")
    return [file.read_text(encoding="utf-8", errors="replace") for _, file in sorted(found)]


def windows(texts: list[str], encode: Callable[[str], list[int]], tokens: int, length: int) -> list[list[int]]:
    """Token ids cut into windows of `length`, `tokens` in all; the last window may be shorter.

    Args:
        encode: a text's token ids.

    Raises:
        ConfigError: the texts are shorter than `tokens`.
    """
    ids: list[int] = []
    for text in texts:
        ids += encode(text)
        if len(ids) >= tokens:
            break
    if len(ids) < tokens:
        raise ConfigError(f"--tokens is {tokens}, but the texts have {len(ids)}: lower it or name more with --text.")
    return [ids[start : min(start + length, tokens)] for start in range(0, tokens, length)]
