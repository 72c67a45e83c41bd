"""Question files in the format of LongBench (arXiv 2308.14508): JSON lines with context, input and answers."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation import scorers
from vllm_lrqk.evaluation.engine import Output, Request
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.prompts import Prompt, Tokens

SCORERS = {"f1": scorers.token_f1, "rouge": scorers.rouge_l, "exact": scorers.exact_match, "classes": None}
MAX_TOKENS = {"f1": 32, "rouge": 512, "exact": 32, "classes": 64}
ROUGE_DATASETS = ("gov_report", "qmsum", "multi_news", "samsum", "vcsum", "dureader")
EXACT_DATASETS = ("passage_retrieval_en", "passage_retrieval_zh", "passage_count")


def split_name(argument: str) -> tuple[Path, str | None]:
    """FILE or FILE=SCORER."""
    name, _, scorer = argument.rpartition("=")
    if scorer in SCORERS and name:
        return Path(name), scorer
    if name and not Path(argument).exists():
        raise EvaluationError(f"--jsonl: {scorer!r} is no scorer; choose from {', '.join(SCORERS)}.")
    return Path(argument), None


def dataset_prompts(file: Path, scorer: str | None, samples: int, longest: int, tokens: Tokens) -> list[Prompt]:
    """The first `samples` questions; contexts above `longest` tokens lose their middle, as in LongBench.

    The length in the records is that of the file's longest prompt, the seed the question's number.
    """
    prompts = []
    for number, line in enumerate(_lines(file)):
        name = scorer or _default_scorer(line)
        request = _request(line, MAX_TOKENS[name], longest, tokens)
        prompts.append((number, request, _scored(line, name, request, tokens)))
    length = max(len(request.token_ids) + len(request.forced_ids) for _, request, _ in prompts)
    return [Prompt(file.stem, length, number, 0, request, score) for number, request, score in prompts[:samples]]


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            missing = [key for key in ("context", "input", "answers") if key not in line]
        except (json.JSONDecodeError, TypeError) as error:
            raise EvaluationError(f"{file}:{number} is not a JSON object: write one question per line.") from error
        if missing or not line["answers"]:
            raise EvaluationError(f"{file}:{number} lacks {' and '.join(missing) or 'answers'}: add them.")
        lines.append(line)
    if not lines:
        raise EvaluationError(f"{file} has no questions: give one JSON object per line.")
    return lines


def _default_scorer(line: dict[str, Any]) -> str:
    dataset = line.get("dataset", "")
    if line.get("all_classes"):
        return "classes"
    return "rouge" if dataset in ROUGE_DATASETS else "exact" if dataset in EXACT_DATASETS else "f1"


def _request(line: dict[str, Any], max_tokens: int, longest: int, tokens: Tokens) -> Request:
    begin = "Read the following text.\n\n"
    question = f"Question: {line['input']}\nAnswer:" if line["input"] else "Summary:"
    context = line["context"]
    room = longest - max_tokens

    def prompt(context: str) -> str:
        return tokens.render([(f"{begin}{context}\n\n{question}", "")])

    excess = tokens.count(prompt(context)) - room
    while excess > 0 and context:
        share = 1 - (excess + 8) / max(1, tokens.count(context))
        half = max(0, int(len(context) * share)) // 2
        context = context[:half] + context[len(context) - half :] if half else ""
        excess = tokens.count(prompt(context)) - room
    if excess > 0:
        raise EvaluationError(f"a question alone takes more than {room} tokens: raise --max-model-len.")
    text = prompt(context)
    return tokens.request(text, text[text.rindex(question) :], max_tokens)


def _scored(
    line: dict[str, Any], scorer: str, request: Request, tokens: Tokens
) -> Callable[[Output], tuple[float, str]]:
    function = SCORERS[scorer] or partial(scorers.classification, classes=line.get("all_classes") or [])

    def score(output: Output) -> tuple[float, str]:
        text = tokens.text(request, output)
        return function(text, line["answers"]), text

    return score
