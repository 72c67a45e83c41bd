"""Text to train on: the Python standard library's sources, and random sequences to copy.

    python training/corpus.py held_out.txt

writes the sources that are held out, for `vllm-lrqk eval --perplexity`.
"""

import argparse
import hashlib
import random
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 0.05
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}


def sources(held_out: bool) -> list[str]:
    """Texts of the standard library's modules; which are held out follows from their names alone."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if SKIPPED_FOLDERS & set(name.parts) or is_held_out(str(name)) != held_out:
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if len(text) > 400:
            texts.append(text)
    return texts


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def repeated_tokens(generator: random.Random, length: int, vocabulary: range) -> tuple[list[int], list[bool]]:
    """Random tokens in which segments of 8 to 64 occur again, in any order; and which tokens can be foretold."""
    pool = [
        [generator.choice(vocabulary) for _ in range(generator.randint(8, 64))] for _ in range(max(2, length // 96))
    ]
    seen: set[int] = set()
    tokens: list[int] = []
    is_copy: list[bool] = []
    while len(tokens) < length:
        chosen = generator.randrange(len(pool))
        tokens += pool[chosen]
        is_copy += [chosen in seen and i > 0 for i in range(len(pool[chosen]))]
        seen.add(chosen)
    return tokens[:length], is_copy[:length]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text("\n".join(sources(held_out=True)))
