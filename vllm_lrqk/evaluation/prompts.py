"""What is asked of every configuration alike: tokens, and how what comes back is scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lrqk.evaluation.engine import Output, Request
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.tasks import TASKS, make_conversation
from vllm_lrqk.evaluation.tasks.sample import Sample, plain

PERPLEXITY = "perplexity "
"""Beginning of the task names whose scores are means of -log p."""


@dataclass(frozen=True)
class Prompt:
    """One sample of one task."""

    task: str
    length: int
    seed: int
    turn: int
    request: Request
    score: Callable[[Output], tuple[float, str]]
    """Score and the text that was scored."""

    @property
    def tokens(self) -> int:
        """Context that the request needs at its end."""
        return len(self.request.token_ids) + len(self.request.forced_ids) + self.request.free_tokens


class Tokens:
    """A tokenizer's texts as requests.

    Args:
        decode_question: leave the question of a prompt to decode steps.
        chat: dialogues are rendered by the tokenizer's chat template, and the texts given here are its own.
    """

    def __init__(self, tokenizer: Any, decode_question: bool, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self._decode_question = decode_question
        self._chat = chat
        self._stop_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def raw(self) -> "Tokens":
        """The same without a chat template."""
        return Tokens(self.tokenizer, self._decode_question)

    def render(self, dialogue: Sequence[tuple[str, str]]) -> str:
        """A dialogue as one text, see `tasks.sample.Render`."""
        if not self._chat:
            return plain(dialogue)
        messages = []
        for said, answer in dialogue:
            messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
        begins = messages.pop()["content"]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + begins

    def ids(self, text: str) -> list[int]:
        # A chat template has the special tokens in its text already.
        return list(self.tokenizer.encode(text, add_special_tokens=not self._chat, verbose=False))

    def count(self, text: str) -> int:
        return len(self.ids(text))

    def request(self, prompt: str, question: str, max_tokens: int) -> Request:
        """A request for at most `max_tokens` after `prompt`, which ends with `question`."""
        ids = self.ids(prompt)
        begin = len(ids)
        if self._decode_question:
            begin = max(1, min(self.count(prompt.removesuffix(question)), begin))
        return Request(ids[:begin], ids[begin:], max_tokens, self._stop_ids)

    def text(self, request: Request, output: Output) -> str:
        """What was generated after the forced tokens."""
        return self.tokenizer.decode(output.token_ids[len(request.forced_ids) :], skip_special_tokens=True)


def use_chat(asked_for: bool | None, tokenizer: Any) -> bool:
    """Whether to ask through the chat template: by default where there is one. Raises EvaluationError without one."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    if asked_for and not has_template:
        raise EvaluationError("--chat: the model's tokenizer has no chat template, leave it out.")
    return has_template if asked_for is None else asked_for


def task_prompts(task: str, length: int, seeds: list[int], turns: int, tokens: Tokens) -> list[Prompt]:
    """Samples of one task, the turns of a text after each other; one turn each where the task knows no more."""
    turns = turns if TASKS[task].turns else 1
    tokens = tokens if TASKS[task].instructs else tokens.raw()
    prompts = []
    for seed in seeds:
        try:
            conversation = make_conversation(task, length, tokens.count, seed, turns, tokens.render)
        except ValueError as error:
            raise EvaluationError(str(error)) from error
        for turn, sample in enumerate(conversation, 1):
            request = tokens.request(sample.prompt, sample.question, sample.max_tokens)
            scored = _scored(sample, request, tokens)
            prompts.append(Prompt(task, length, seed, turn if turns > 1 else 0, request, scored))
    return prompts


def _scored(sample: Sample, request: Request, tokens: Tokens) -> Callable[[Output], tuple[float, str]]:
    def score(output: Output) -> tuple[float, str]:
        text = tokens.text(request, output)
        return sample.score(text), text

    return score


def perplexity_prompts(
    file: Path, length: int, samples: int, continuation: int, tokens: Tokens, distributions: Path | None = None
) -> list[Prompt]:
    """Windows of `length` tokens of a text, apart from each other and evenly spread over it.

    Prefill is exact under every configuration, and the token after it comes from prefill. So a window's last
    `continuation` tokens are scored, each predicted by a decode step that was made to take the text's own tokens.
    The seed in the records is the window's first token.

    Args:
        distributions: folder for the distributions of dense attention, with which other methods are compared.
    """
    if not 1 <= continuation <= length - 2:
        raise EvaluationError(f"--continuation is {continuation}, but must be 1 to {length - 2} at length {length}.")
    ids = tokens.raw().ids(file.read_text())
    windows = min(samples, len(ids) // length)
    if windows == 0:
        raise EvaluationError(f"{file} has {len(ids)} tokens: use shorter --lengths than {length} or a longer text.")
    prompts = []
    for window in range(windows):
        begin = window * (len(ids) - length) // max(1, windows - 1)
        text = ids[begin : begin + length]
        split = length - continuation - 1
        kept = None if distributions is None else distributions / f"{file.name}-{length}-{begin}.npy"
        request = Request(text[:split], text[split:], 0, [], kept)
        prompts.append(Prompt(f"{PERPLEXITY}{file.name}", length, begin, 0, request, _loss))
    return prompts


def mean_divergence(output: Output) -> float | None:
    """Of the scored tokens, in nats; None where nothing was compared."""
    scored = output.divergences[1:]  # the first token is predicted by prefill
    return sum(scored) / len(scored) if scored else None


def _loss(output: Output) -> tuple[float, str]:
    scored = output.logprobs[1:]  # the first token is predicted by prefill
    return -sum(scored) / len(scored), ""
