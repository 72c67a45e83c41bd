"""`vllm-lrqk eval`: checks, runs, and writes records, tables and plot."""

import json
import os
import sys
from dataclasses import asdict

from vllm_lrqk.evaluation.arguments import check, configurations, make_parser
from vllm_lrqk.evaluation.errors import EvaluationError

WIDTH = 160  # of the table where the output is no terminal


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, that of the process if none is given; ends the process with a sentence if it is wrong."""
    words = sys.argv[1:] if arguments is None else arguments
    if "--attention" in words:
        from vllm_lrqk.evaluation.attention import main as attention_main

        return attention_main([word for word in words if word != "--attention"])
    try:
        return _run(words)
    except EvaluationError as error:
        raise SystemExit(f"vllm-lrqk eval: {error}") from error


def _run(words: list[str]) -> None:
    parsed = make_parser().parse_args(words)
    check(parsed)
    compared = configurations(parsed)
    try:
        import matplotlib  # noqa: F401
        from rich.console import Console
        from tqdm import tqdm  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"{error.name} is missing: pip install vllm-lrqk[eval].") from error
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from vllm_lrqk.evaluation.plot import plot
    from vllm_lrqk.evaluation.prompts import Tokens, use_chat
    from vllm_lrqk.evaluation.records import Store
    from vllm_lrqk.evaluation.report import rows, table
    from vllm_lrqk.evaluation.run import engine_settings, evaluate, identity, load_model, make_prompts, on_cpu

    config, tokenizer = load_model(parsed.model)
    context = min(config.max_position_embeddings, parsed.max_model_len or config.max_position_embeddings)
    parsed.chat = use_chat(parsed.chat, tokenizer)
    prompts = make_prompts(parsed, Tokens(tokenizer, parsed.decode_question, parsed.chat), context)
    settings = engine_settings(parsed, config, prompts)
    if parsed.eager is None:
        parsed.eager = on_cpu()
    store = Store(parsed.output, identity(parsed, compared))
    found = rows(evaluate(parsed, compared, prompts, store, settings))
    console = Console()
    console.width = console.width if console.is_terminal else WIDTH
    console.print(table(found))
    (parsed.output / "results.json").write_text(json.dumps([asdict(row) for row in found], indent=1))
    plot(found, parsed.output / "accuracy.png")
    print(f"Records, table and plot are in {parsed.output}.")
