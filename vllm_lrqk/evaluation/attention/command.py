"""vllm-lrqk eval --attention: attention methods at equal device bytes, on captured or synthetic layers.

A source is a set of the generator (s1 to s4) or a folder that an engine with `lrqk.capture` wrote. Budgets are shares
of the bytes of all keys and values. What is measured, and how bytes are counted, is in docs/measurements.md.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from tqdm import tqdm

from vllm_lrqk.core.config import ConfigError
from vllm_lrqk.evaluation.attention import report
from vllm_lrqk.evaluation.attention.budgets import Settings
from vllm_lrqk.evaluation.attention.captures import CaptureError
from vllm_lrqk.evaluation.attention.measures import Result, evaluate
from vllm_lrqk.evaluation.attention.methods import METHODS
from vllm_lrqk.evaluation.attention.sources import Source, load_source
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

DEFAULTS = Settings()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vllm-lrqk eval --attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", nargs="+", default=["s1", "s2"], metavar="SET|FOLDER")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.2, 0.3, 0.5], metavar="SHARE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rank", type=int, default=DEFAULTS.rank, help="of lrqk and key-pca (default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=DEFAULTS.page_size, help="of the same (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="decode steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write attention.json and plots")
    return parser


def _check(arguments: argparse.Namespace) -> Settings:
    """Raise EvaluationError or ConfigError for values that cannot be evaluated."""
    if arguments.steps < 1:
        raise EvaluationError(f"--steps is {arguments.steps}, but must be 1 or more.")
    for budget in arguments.budgets:
        if not 0 < budget <= 1:
            raise EvaluationError(f"--budgets has {budget:g}, but must be shares above 0 and up to 1.")
    config = LRQKSettings(rank=arguments.rank, page_size=arguments.page_size)
    return Settings(config.rank, config.page_size, config.sink_tokens, config.recent_tokens)


def _check_fit(sources: list[Source], rank: int) -> None:
    for source in sources:
        head_size = min(qkv.key.shape[-1] for qkv in source.sequences)
        if rank > head_size:
            raise EvaluationError(f"--rank is {rank}, but must be at most the head size of {source.name}, {head_size}.")


def _evaluate(arguments: argparse.Namespace) -> list[Result]:
    settings = _check(arguments)
    sources = [load_source(name, arguments.steps) for name in arguments.source]
    _check_fit(sources, settings.rank)
    methods, budgets = list(dict.fromkeys(arguments.methods)), sorted(set(arguments.budgets))
    results: list[Result] = []
    for source in sources:
        total = len(source.sequences) * len(methods) * len(budgets) * arguments.steps
        with tqdm(total=total, desc=source.name, unit="step", disable=not sys.stderr.isatty()) as bar:
            results += evaluate(source, methods, budgets, settings, arguments.steps, bar.update)
    if not results:
        raise EvaluationError(
            f"no method fits into {max(budgets):.0%} of the bytes of all keys and values: raise --budgets or lower "
            "--page-size."
        )
    report.print_tables(Console(width=130 if not sys.stdout.isatty() else None), results, methods, budgets)
    return results


def main(arguments: list[str]) -> None:
    """Run the command; a mistake ends it with one sentence on stderr and exit status 2."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        results = _evaluate(parsed)
        if parsed.output is not None:
            parsed.output.mkdir(parents=True, exist_ok=True)
            settings = {key: value for key, value in vars(parsed).items() if key != "output"}
            report.write_json(parsed.output / "attention.json", results, settings)
            report.plot(parsed.output, results)
    except (EvaluationError, CaptureError, ConfigError, OSError) as error:
        parser.error(str(error))
