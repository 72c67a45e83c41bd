"""The command line of `vllm-lrqk eval`, checked before anything is started."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation.datasets import split_name
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.methods import DEFAULT_METHOD, check_settings
from vllm_lrqk.evaluation.tasks import MINIMUM_LENGTH, TASKS

SHIPPED_MODEL = Path(__file__).parent / "model"
DENSE = "dense"
BOOLEAN = argparse.BooleanOptionalAction
CONFIG_HELP = 'settings of a method to compare, LRQK or the one that the key "backend" names; repeatable'
DEFAULT_TASKS = [name for name, task in TASKS.items() if task.instructs]


@dataclass(frozen=True)
class Configuration:
    """Dense attention (`backend` None), or a method and its settings; `budget` makes top_k a share of the length."""

    name: str
    backend: str | None
    method_settings: dict[str, Any] = field(default_factory=dict)
    budget: float | None = None

    def settings(self, length: int) -> dict[str, Any]:
        """The method's settings for prompts of `length` tokens."""
        if self.budget is None:
            return self.method_settings
        return self.method_settings | {"top_k": max(1, round(self.budget * length))}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lrqk eval",
        description="The same prompts through dense attention and other methods, and what differs.",
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder or name of a model; default: the small one that comes with the package")
    add("--tasks", nargs="+", metavar="TASK", help=f"of {', '.join(TASKS)}; default: all but needle")
    add("--lengths", nargs="+", type=int, default=[4096], metavar="TOKENS", help="prompt and answer; default 4096")
    add("--samples", type=int, default=20, help="per task and length; default 20")
    add("--seed", type=int, default=0, help="of the first sample; the others follow it")
    add("--config", action="append", default=[], metavar="NAME=JSON", help=CONFIG_HELP)
    add("--budget", nargs="+", type=float, default=[], metavar="SHARE", help="LRQK with top_k = share of the length")
    add("--dense-only", action="store_true", help="dense attention alone: what a model solves, before comparing")
    add("--perplexity", nargs="+", type=Path, default=[], metavar="FILE", help="texts whose continuation is scored")
    add("--continuation", type=int, default=256, help="tokens of each window that are scored; default 256")
    add("--jsonl", nargs="+", default=[], metavar="FILE[=SCORER]", help="LongBench files; f1, rouge, exact, classes")
    add("--multi-turn", type=int, default=1, metavar="TURNS", help="questions about one text, asked in turn")
    add("--decode-question", action="store_true", help="read the question by decode steps, not by prefill")
    add("--chat", action=BOOLEAN, help="ask through the tokenizer's chat template; default: where it has one")
    add("--output", type=Path, default=Path("evaluation"), help="folder of records, tables and plot")
    add("--batch", type=int, default=4, help="texts served together; default 4")
    add("--dtype", default="auto", help="as of vLLM")
    add("--max-model-len", type=int, help="default: what the longest prompt needs")
    add("--eager", action=BOOLEAN, help="start engines without compiling the model; default: on CPU")
    add("--engine", type=json_object, default={}, metavar="JSON", help="further arguments of vLLM's LLM")
    add("--attention", action="store_true", help="evaluate attention outputs instead; see --attention --help")
    return parser


def json_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises argparse's error otherwise."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} must be a JSON object such as {{"top_k": 512}}')
    return value


def configurations(arguments: argparse.Namespace) -> list[Configuration]:
    """Dense attention first, then what was asked for, LRQK's default settings if nothing was."""
    found = [Configuration(DENSE, None), *map(_configuration, arguments.config)]
    for budget in arguments.budget:
        if not 0 < budget <= 1:
            raise EvaluationError(f"--budget is {budget:g}, but must be above 0 and at most 1.")
        found.append(Configuration(f"budget {budget:g}", DEFAULT_METHOD, {}, budget))
    if arguments.dense_only and len(found) > 1:
        raise EvaluationError("--dense-only is given beside --config or --budget: leave one of them out.")
    if len(found) == 1 and not arguments.dense_only:
        found.append(Configuration(DEFAULT_METHOD.lower(), DEFAULT_METHOD))
    names = [configuration.name for configuration in found]
    for name in names:
        if names.count(name) > 1:
            raise EvaluationError(f"--config: the name {name!r} is given twice; rename one.")
    for configuration in found[1:]:
        try:
            check_settings(configuration.backend or "", configuration.settings(max(arguments.lengths)))
        except EvaluationError as error:
            raise EvaluationError(f"--config {configuration.name}: {error}") from error
    return found


def _configuration(text: str) -> Configuration:
    name, separator, settings = text.partition("=")
    if not separator or not name:
        raise EvaluationError(f"--config: {text!r} has no name; write NAME='{{\"top_k\": 512}}'.")
    try:
        values = json_object(settings)
    except argparse.ArgumentTypeError as error:
        raise EvaluationError(f"--config {name}: {error}.") from error
    backend = values.pop("backend", DEFAULT_METHOD)
    return Configuration(name, str(backend), values)


def check(arguments: argparse.Namespace) -> None:
    """Complete the tasks and the model. Raises EvaluationError for the first thing that cannot be done."""
    if arguments.model is None:
        if not (SHIPPED_MODEL / "config.json").exists():
            raise EvaluationError("MODEL is missing, and this package was built without its own: name one.")
        arguments.model = str(SHIPPED_MODEL)
    if arguments.tasks is None:
        arguments.tasks = [] if arguments.perplexity or arguments.jsonl else DEFAULT_TASKS
    for task in arguments.tasks:
        if task not in TASKS:
            raise EvaluationError(f"--tasks: {task!r} is unknown; choose from {', '.join(TASKS)}.")
    for name, least in (("samples", 1), ("batch", 1), ("multi_turn", 1), ("continuation", 1)):
        if getattr(arguments, name) < least:
            raise EvaluationError(
                f"--{name.replace('_', '-')} is {getattr(arguments, name)}, but must be {least} or more."
            )
    for length in arguments.lengths:
        if length < MINIMUM_LENGTH:
            raise EvaluationError(f"--lengths: {length} is too short; use {MINIMUM_LENGTH} or more.")
    if arguments.multi_turn > 1 and not any(TASKS[task].turns for task in arguments.tasks):
        turns = ", ".join(name for name in TASKS if TASKS[name].turns)
        raise EvaluationError(f"--multi-turn: none of the tasks has several questions per text; add one of {turns}.")
    for file in [*arguments.perplexity, *(split_name(text)[0] for text in arguments.jsonl)]:
        if not file.is_file():
            raise EvaluationError(f"{file} is not a file: name an existing one.")
    names = [file.stem for file, _ in map(split_name, arguments.jsonl)] + [file.name for file in arguments.perplexity]
    for name in [*names, *TASKS]:
        if [*names, *TASKS].count(name) > 1:
            raise EvaluationError(f"two things to evaluate are called {name!r}: rename one file.")
