"""`vllm-lrqk doctor`: one page on this machine and installation; the exit code is 1 if something does not serve.

vllm-lrqk doctor [--json] [--no-self-test]
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from vllm_lrqk.doctor import machine, selftest, software
from vllm_lrqk.doctor.finding import Finding

MARKS = {"fine": "ok", "note": "NOTE", "problem": "PROBLEM"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lrqk doctor", description="Look at this machine and installation; exit code 1 if it cannot serve."
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--no-self-test", action="store_true", help="do not run the kernels against plain torch")
    parser.add_argument("--strict", action="store_true", help="exit code 1 also for notes")
    return parser


def examine(with_self_test: bool = True) -> Iterator[Finding]:
    """All findings, in the order of the page."""
    yield from software.findings()
    yield from machine.findings()
    if with_self_test:
        yield from selftest.findings()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, that of the process if none is given; ends the process with the exit code."""
    parsed = make_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    found = []
    for finding in examine(not parsed.no_self_test):
        found.append(finding)
        if not parsed.json:
            print(line(finding), flush=True)
    if parsed.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    bad = {"problem", "note"} if parsed.strict else {"problem"}
    is_bad = any(finding.status in bad for finding in found)
    raise SystemExit(1 if is_bad else 0)


def line(finding: Finding) -> str:
    """One line of the page, with the remedy below what is not fine."""
    text = f"{MARKS[finding.status]:<8}{finding.topic:<16}{finding.text}"
    return text if not finding.remedy else f"{text}\n{'':<24}-> {finding.remedy}"
