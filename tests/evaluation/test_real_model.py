"""A pretrained model that nobody trained for this package, served by LRQK."""

import json
from pathlib import Path

import pytest
from engines import engine, greedy
from transformers import AutoTokenizer
from vllm import TokensPrompt

from vllm_lrqk.evaluation.command import main

pytestmark = [pytest.mark.engine, pytest.mark.real_model]

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"]
TOKENS = 24


def test_smollm2_answers_as_with_dense_attention(smollm2_folder):
    """The selection covers every prompt, so that the tokens are those of dense attention."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    prompts = [TokensPrompt(prompt_token_ids=tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    answers = []
    for lrqk in (None, {"page_size": 16}):
        with engine(smollm2_folder, lrqk, max_model_len=256) as llm:
            answers.append([list(output.token_ids) for output in greedy(llm, prompts, TOKENS)])
    dense, ours = answers
    assert "Paris" in tokenizer.decode(ours[0])
    assert ours == dense


def test_a_question_in_a_chat_is_read_by_decode_steps(smollm2_folder, tmp_path):
    """The mark that ends what the user says is the model's stop token, and among the tokens that it must take."""
    arguments = ["--tasks", "niah_single", "--lengths", "512", "--samples", "2", "--decode-question", "--dense-only"]
    main([str(smollm2_folder), *arguments, "--dtype", "float32", "--output", str(tmp_path)])
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [record["score"] for record in records] == [1, 1]
    assert all("<|im_end|>" not in record["output"] for record in records)


def test_gemma3_with_its_windows_goes_on_as_with_dense_attention(gemma3_folder):
    """Prompts within the window of 512 tokens and beyond it; the selection covers all of them."""
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    tokens = AutoTokenizer.from_pretrained(gemma3_folder).encode(text)
    prompts = [TokensPrompt(prompt_token_ids=tokens[:count]) for count in (100, 510, 1300)]
    settings = {"max_model_len": 1536, "max_num_batched_tokens": 700}
    answers = []
    for lrqk in (None, {"page_size": 256}):
        with engine(gemma3_folder, lrqk, has_windows=lrqk is not None, **settings) as llm:
            answers.append([list(output.token_ids) for output in greedy(llm, prompts, TOKENS)])
    dense, ours = answers
    assert ours == dense
    assert len(set(dense[-1])) > 4  # and not one token over and over
