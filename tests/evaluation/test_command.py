"""What the command refuses before it starts an engine, and how it cuts its work."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, LlamaConfig

from vllm_lrqk.core.config import Settings
from vllm_lrqk.evaluation.arguments import DEFAULT_TASKS, Configuration, check, configurations, make_parser
from vllm_lrqk.evaluation.command import main
from vllm_lrqk.evaluation.datasets import dataset_prompts, split_name
from vllm_lrqk.evaluation.engine import Batch, Output, Request, dense_bytes, is_asked_for
from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.prompts import Prompt, Tokens, perplexity_prompts, task_prompts, use_chat
from vllm_lrqk.evaluation.records import Store
from vllm_lrqk.evaluation.run import engine_settings, evaluate
from vllm_lrqk.methods import METHODS
from vllm_lrqk.methods.lrqk.settings import LRQKSettings


@pytest.fixture(scope="module")
def tokenizer(needle_folder):
    return AutoTokenizer.from_pretrained(needle_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "riddle"], "--tasks: 'riddle' is unknown; choose from niah_single"),
        (["--lengths", "100"], "--lengths: 100 is too short; use 256 or more."),
        (["--tasks", "needle", "--lengths", "2097152"], "--lengths: 2097152 tokens are beyond the model's context of"),
        (["--samples", "0"], "--samples is 0, but must be 1 or more."),
        (["--perplexity", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--jsonl", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--jsonl", "nowhere.jsonl=bleu"], "--jsonl: 'bleu' is no scorer; choose from f1, rouge, exact, classes."),
        (["--config", '{"top_k": 5}'], "--config: '{\"top_k\": 5}' has no name"),
        (["--config", "a={"], "--config a: '{' is not JSON"),
        (
            ["--config", 'a={"backend": "lrqk"}'],
            f"--config a: backend is 'lrqk', but must be one of {', '.join(METHODS)}.",
        ),
        (
            ["--config", 'a={"backend": "TURBO"}'],
            f"--config a: backend is 'TURBO', but must be one of {', '.join(METHODS)}.",
        ),
        (["--chat"], "--chat: the model's tokenizer has no chat template, leave it out."),
        (["--config", 'a={"topk": 5}'], "--config a: lrqk.topk is not a setting of vllm-lrqk; did you mean top_k?"),
        (["--config", "a={}", "--config", "a={}"], "--config: the name 'a' is given twice"),
        (["--dense-only", "--budget", "0.5"], "--dense-only is given beside --config or --budget: leave one of them"),
        (["--budget", "1.5"], "--budget is 1.5, but must be above 0 and at most 1."),
        (["--tasks", "copy", "--multi-turn", "2"], "--multi-turn: none of the tasks has several questions per text"),
        (
            ["--tasks", "needle", "--max-model-len", "512"],
            "--lengths: 4096 tokens are beyond",
        ),
    ],
)
def test_refusals(arguments, message, needle_folder, tmp_path):
    with pytest.raises(SystemExit, match=re.escape(f"vllm-lrqk eval: {message}")):
        main([str(needle_folder), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="MODEL 'nowhere/at-all' cannot be loaded"):
        main(["nowhere/at-all", "--tasks", "needle", "--output", str(tmp_path)])


def test_without_a_model_the_shipped_one_is_taken(monkeypatch, needle_folder, tmp_path):
    monkeypatch.setattr("vllm_lrqk.evaluation.arguments.SHIPPED_MODEL", needle_folder)
    arguments = make_parser().parse_args([])
    check(arguments)
    assert arguments.model == str(needle_folder)
    monkeypatch.setattr("vllm_lrqk.evaluation.arguments.SHIPPED_MODEL", tmp_path)
    with pytest.raises(SystemExit, match="MODEL is missing"):
        main([])


def test_the_script_knows_one_command():
    result = subprocess.run([sys.executable, "-m", "vllm_lrqk.eval", "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--perplexity" in result.stdout


def parse(*words):
    arguments = make_parser().parse_args(["m", *words])
    check(arguments)
    return arguments


def test_defaults():
    assert parse().tasks == DEFAULT_TASKS
    assert [c.name for c in configurations(parse())] == ["dense", "lrqk"]
    compared = configurations(parse("--config", 'a={"rank": 8}', "--budget", "0.25", "0.5"))
    assert [c.name for c in compared] == ["dense", "a", "budget 0.25", "budget 0.5"]
    assert [c.name for c in configurations(parse("--dense-only"))] == ["dense"]
    assert compared[0].backend is None and compared[2].settings(4096) == {"top_k": 1024}
    assert (compared[1].backend, compared[1].settings(4096)) == ("LRQK", {"rank": 8})


def test_a_backend_key_names_the_method(monkeypatch):
    """A method of any name: its settings go under its key, and only one with a host tier is given host memory."""

    class ToySettings(Settings):
        key = "toy"
        width: int = 4

    ToySettings = dataclass(frozen=True, kw_only=True)(ToySettings)
    monkeypatch.setitem(METHODS, "TOY", "toy:Toy")
    monkeypatch.setattr(
        "vllm_lrqk.evaluation.methods.method_class",
        lambda name: SimpleNamespace(settings_type=ToySettings if name == "TOY" else LRQKSettings),
    )
    arguments = parse("--config", 'toy={"backend": "TOY", "width": 8}', "--config", 'lrqk={"rank": 8}')
    compared = configurations(arguments)[1:]
    assert [(c.backend, c.settings(512)) for c in compared] == [("TOY", {"width": 8}), ("LRQK", {"rank": 8})]
    config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    prompt = Prompt("qa", 500, 0, 0, Request([1] * 500, [], 12, []), lambda output: (0.0, ""))
    settings = engine_settings(arguments, config, [prompt])
    toy, lrqk = (settings(c.backend, c.settings(512))["additional_config"] for c in compared)
    assert toy == {"toy": {"width": 8}}
    assert lrqk["lrqk"]["rank"] == 8 and lrqk["lrqk"]["host_memory_gib"] > 0
    with pytest.raises(
        EvaluationError, match=r"--config x: toy\.wdth is not a setting of vllm-lrqk; did you mean width"
    ):
        configurations(parse("--config", 'x={"backend": "TOY", "wdth": 8}'))


@pytest.mark.parametrize(
    ("found", "backend", "has_windows", "expected"),
    [
        ({"LRQKImpl"}, "LRQK", False, True),
        ({"CPUAttentionBackendImpl"}, "LRQK", False, False),
        ({"CPUAttentionBackendImpl", "LRQKImpl"}, "LRQK", False, False),
        ({"FlashAttentionImpl", "LRQKImpl"}, "LRQK", True, True),
        ({"FlashAttentionImpl"}, "LRQK", True, False),
        ({"FlashAttentionImpl"}, None, False, True),
        ({"LRQKImpl"}, None, False, False),
    ],
)
def test_an_engine_proves_its_method(found, backend, has_windows, expected):
    assert is_asked_for(found, backend, has_windows) == expected


def test_bytes_of_dense_attention():
    """Windows of three layers in four: they stop to grow."""
    plain = SimpleNamespace(sliding_window=512)
    assert dense_bytes(plain, 4, 100) == (400, 0)
    mixed = SimpleNamespace(layer_types=["sliding_attention"] * 3 + ["full_attention"], sliding_window=512)
    assert dense_bytes(mixed, 4, 100) == (100, 3 * 512 * 100)


def test_engines_start_eagerly_on_the_cpu(monkeypatch, needle_folder, tmp_path):
    """Unless asked otherwise."""
    for options, expected in (([], True), (["--no-eager"], False)):
        seen = []
        monkeypatch.setattr("vllm_lrqk.evaluation.run.Engine", lambda settings, *_, seen=seen: _stop(seen, settings))
        arguments = [str(needle_folder), "--tasks", "needle", "--lengths", "512", "--samples", "1"]
        with pytest.raises(_Stopped):
            main([*arguments, "--output", str(tmp_path / str(expected)), *options])
        assert seen[0]["enforce_eager"] == expected


class _Stopped(Exception):
    pass


def _stop(seen, settings):
    seen.append(settings)
    raise _Stopped


def line(**values):
    return json.dumps({"context": "badax bedax " * 300, "input": "bidax?", "answers": ["bodax"], **values})


def test_question_files(tmp_path, tokenizer):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join([line(), line(dataset="gov_report", input=""), line(all_classes=["bodax", "budax"])]))
    tokens = Tokens(tokenizer, decode_question=False)
    prompts = dataset_prompts(file, None, 10, 600, tokens)
    assert [prompt.request.free_tokens for prompt in prompts] == [32, 512, 64]
    assert all(prompt.tokens <= 600 for prompt in prompts)
    assert len({prompt.length for prompt in prompts}) == 1
    right = Output(tokenizer.encode("bodax"), [])
    assert [prompt.score(right)[0] for prompt in prompts] == [1, 1, 1]
    assert [prompt.score(Output(tokenizer.encode("budax"), []))[0] for prompt in prompts] == [0, 0, 0]
    assert dataset_prompts(file, "exact", 1, 600, tokens)[0].request.free_tokens == 32
    file.write_text('{"context": "x"}')
    with pytest.raises(EvaluationError, match=r"questions.jsonl:1 lacks input and answers"):
        dataset_prompts(file, None, 1, 600, tokens)


def test_names_of_question_files(tmp_path):
    assert split_name("a.jsonl=rouge")[1] == "rouge"
    assert split_name("a.jsonl")[1] is None


def test_windows_are_apart(tmp_path, tokenizer):
    file = tmp_path / "text.txt"
    file.write_text("badax " * 1000)
    tokens = Tokens(tokenizer, decode_question=False)
    prompts = perplexity_prompts(file, 300, 10, 50, tokens)
    begins = [prompt.seed for prompt in prompts]
    assert begins == [0, 350, 700]
    for prompt in prompts:
        assert (len(prompt.request.token_ids), len(prompt.request.forced_ids)) == (249, 51)
        assert prompt.score(Output([], [-9.0] + [-2.0] * 50))[0] == 2  # the first token comes from prefill
    with pytest.raises(EvaluationError, match="has 1000 tokens: use shorter --lengths than 2000"):
        perplexity_prompts(file, 2000, 1, 50, tokens)


CHAT = """{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture
def chatting(needle_folder):
    found = AutoTokenizer.from_pretrained(needle_folder)
    found.chat_template = CHAT
    return found


def test_a_chat_template_is_used_where_there_is_one(tokenizer, chatting):
    assert [use_chat(asked, tokenizer) for asked in (None, False)] == [False, False]
    assert [use_chat(asked, chatting) for asked in (None, True, False)] == [True, True, False]


def test_questions_are_asked_through_the_chat_template():
    """The user says the text and the question, and the answer's beginning comes after the template's."""
    texts = []

    class Letters:
        eos_token_id, chat_template = None, CHAT
        apply_chat_template = staticmethod(
            lambda messages, **_: "".join(f"<{m['role']}> {m['content']}\n" for m in messages) + "<assistant> "
        )

        def encode(self, text, add_special_tokens, verbose):
            texts.append((text, add_special_tokens))
            return text.split()

    tokens = Tokens(Letters(), decode_question=True, chat=True)
    first, second = task_prompts("niah_single", 512, [0], 2, tokens)
    assert not any(special for _, special in texts)  # the template has its own
    for prompt in (first, second):
        asked = " ".join(prompt.request.token_ids + prompt.request.forced_ids)
        assert asked.startswith("<user> Some special magic numbers")
        assert re.search(r"<assistant> The special magic number for \S+ mentioned in the provided text is$", asked)
        assert " ".join(prompt.request.forced_ids).startswith("What is the special magic number for")
        assert prompt.tokens <= 512
    answered = " ".join(first.request.token_ids + first.request.forced_ids)
    assert " ".join(second.request.token_ids + second.request.forced_ids).startswith(answered)
    texts.clear()
    task_prompts("needle", 512, [0], 1, tokens)  # no instruction, no chat
    assert all(special and "<user>" not in text for text, special in texts)


def test_questions_can_be_left_to_decode_steps(tokenizer):
    (whole,) = task_prompts("needle", 512, [0], 1, Tokens(tokenizer, decode_question=False))
    (split,) = task_prompts("needle", 512, [0], 1, Tokens(tokenizer, decode_question=True))
    assert whole.request.forced_ids == []
    assert split.request.token_ids + split.request.forced_ids == whole.request.token_ids
    assert len(split.request.forced_ids) == 1
    answer = Output([*split.request.forced_ids, 0, 0], [])
    assert split.score(answer)[1] == tokenizer.decode([0, 0], skip_special_tokens=True)


class FakeEngine:
    """Answers nothing, and remembers what it was asked."""

    started: list = []

    def __init__(self, settings, backend, log):
        self.about = {"device_bytes_per_token": 26.0, "device_bytes_per_request": 0.0, "kv_heads": 2}
        self.is_lrqk, self.batches = backend == "LRQK", []
        FakeEngine.started.append((settings, self.batches))

    def answer(self, requests):
        self.batches.append(len(requests))
        counts = {"decode_tokens": 8, "rows_attended": 160, "rows_hit": 3, "rows_missed": 1}
        return Batch([Output([], [])] * len(requests), counts if self.is_lrqk else {})

    def close(self):
        pass


def test_an_engine_per_setting_and_turns_in_order(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr("vllm_lrqk.evaluation.run.Engine", FakeEngine)
    FakeEngine.started = []
    arguments = parse("--batch", "2", "--output", str(tmp_path))
    compared = [Configuration("dense", None), Configuration("half", "LRQK", {}, 0.5)]
    tokens = Tokens(tokenizer, decode_question=False)
    prompts = [p for length in (512, 1024) for p in task_prompts("needle", length, [0, 1, 2], 2, tokens)]
    records = evaluate(arguments, compared, prompts, Store(tmp_path, {}), lambda backend, settings: settings)
    assert [settings for settings, _ in FakeEngine.started] == [{}, {"top_k": 256}, {"top_k": 512}]
    assert [batches for _, batches in FakeEngine.started] == [[2, 2, 1, 1] * 2, [2, 2, 1, 1], [2, 2, 1, 1]]
    assert len(records) == 24
    assert (records[-1].steps, records[-1].rows_attended, records[-1].rows_hit) == (16, 160, 3)
    FakeEngine.started = []
    again = evaluate(arguments, compared, prompts, Store(tmp_path, {}), lambda backend, settings: settings)
    assert again == records and FakeEngine.started == []
