"""Links, anchors and paths of all Markdown files resolve."""

import re
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("table")
# A file or folder of the repository, named anywhere in the text: from the root, or from the package.
PATH = re.compile(
    r"(?<![\w/.<>{}-])(?:vllm_lrqk|csrc|tests|docs|benchmarks|examples|scripts|training|"
    r"core|devices|methods|integration|evaluation)/(?:[\w/.-]*\.(?:py|md|svg|png|h|cuh|cpp|cu|json)\b|(?:[\w-]+/)*(?!\w))"
)
PLACEHOLDER = "NAME"


def documents() -> list[Path]:
    """All Markdown files that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


def flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from flat(token.children or [])


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings of a document: `## A b, c` is `a-b-c`, the second one `a-b-c-1`."""
    tokens = MARKDOWN.parse(text)
    found: set[str] = set()
    for heading, inline in pairwise(tokens):
        if heading.type != "heading_open":
            continue
        title = "".join(part.content for part in inline.children or [])
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


def broken_links(document: Path, text: str) -> list[str]:
    """Targets of relative links and images that lead nowhere."""
    broken = []
    for token in flat(MARKDOWN.parse(text)):
        target = token.attrs.get("href") or token.attrs.get("src")
        if not target or urlsplit(str(target)).scheme:
            continue
        parts = urlsplit(unquote(str(target)))
        file = document.parent / parts.path if parts.path else document
        exists = file.exists() and file.resolve().is_relative_to(ROOT)
        if exists and parts.fragment:
            own = text if file == document else file.read_text()
            exists = file.suffix == ".md" and parts.fragment in anchors(own)
        if not exists:
            broken.append(str(target))
    return broken


def missing_paths(text: str) -> list[str]:
    """Files and folders that the text names and the repository does not have."""
    names = {name for name in PATH.findall(text) if PLACEHOLDER not in name}
    return sorted(name for name in names if not any((root / name).exists() for root in (ROOT, ROOT / "vllm_lrqk")))


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_resolve(document):
    text = document.read_text()
    assert broken_links(document, text) == []
    assert missing_paths(text) == []


def test_what_does_not_resolve_is_found():
    text = """# A b, `c`\n# A b c\n
[ok](#a-b-c) [ok](#a-b-c-1) [ok](docs/design.md#pages) [ok](https://example.org/x#y) ![ok](docs/tiers.svg)
[file](docs/none.md) [anchor](docs/design.md#none) [own](#none) [outside](../../etc/hosts) ![picture](docs/none.svg)
`core/step.py` and `tests/docs/test_links.py` are there, `core/none.py`, tests/none.py and `csrc/none/` are not.
`vllm_lrqk/methods/NAME/` stands for any, `csrc/` and `tests/docs/` are there, `methods/lrqk/cpu*` is no path.
"""
    assert broken_links(ROOT / "README.md", text) == [
        *("docs/none.md", "docs/design.md#none", "#none", "../../etc/hosts", "docs/none.svg")
    ]
    assert missing_paths(text) == ["core/none.py", "csrc/none/", "docs/none.md", "docs/none.svg", "tests/none.py"]
