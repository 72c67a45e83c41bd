"""The evaluation command end to end: what is equal to dense attention, what is not, and that it goes on."""

import json
import math
import random

import numpy as np
import pytest

from vllm_lrqk.evaluation.command import main
from vllm_lrqk.evaluation.distributions import KEPT
from vllm_lrqk.evaluation.tasks.words import CODED_WORDS

pytestmark = pytest.mark.engine

CONTINUATION = 16
# At 512 tokens the selection covers everything, at 1536 it does not.
LRQK = {"top_k": 400, "page_size": 64, "hot_cache": True, "residual": "linear"}
# Four rows and a page's start: too little for a sentence of ten words.
TINY = {"top_k": 1, "recent_tokens": 1, "sink_tokens": 0, "page_size": 16, "rank": 4, "residual": "none"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words of which many occurred before, so that the needle model has something to predict."""
    rng = random.Random(0)
    words = rng.choices(CODED_WORDS, k=300)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(words + rng.choices(CODED_WORDS, k=1000) + words[::-1] + words))
    return file


@pytest.fixture(scope="module")
def command(needle_folder, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    arguments = [str(needle_folder), "--tasks", "needle", "passage", "--lengths", "512", "1536"]
    arguments += ["--samples", "3", "--multi-turn", "2", "--decode-question", "--dtype", "float32"]
    arguments += ["--output", str(folder)]
    arguments += ["--perplexity", str(text), "--continuation", str(CONTINUATION)]
    arguments += ["--config", f"lrqk={json.dumps(LRQK)}", "--config", f"tiny={json.dumps(TINY)}"]
    main(arguments)
    return arguments, folder


def rows_of(folder):
    return {
        (row["task"].split()[0], row["length"], row["turn"], row["configuration"]): row
        for row in json.loads((folder / "results.json").read_text())
    }


def test_scores(command):
    rows = rows_of(command[1])
    assert len(rows) == 3 * 2 * 5  # configurations; lengths; two turns, passage, both tasks together, perplexity
    for length in (512, 1536):
        for task, turn in (("needle", 1), ("needle", 2), ("passage", 0)):
            dense, lrqk, tiny = (rows[task, length, turn, name] for name in ("dense", "lrqk", "tiny"))
            assert dense["value"] == lrqk["value"] == 1
            assert lrqk["difference"] == 0 and lrqk["low"] < 0 < lrqk["high"]
            assert tiny["value"] < 0.9 and tiny["difference"] == pytest.approx(tiny["value"] - 1)
            assert lrqk["samples"] == tiny["samples"] == 3


def test_what_was_attended(command):
    rows = rows_of(command[1])
    for length in (512, 1536):
        row = rows["needle", length, 1, "lrqk"]
        assert row["tokens_attended"] <= min(row["tokens_attended"] / row["share_attended"] + 16, 400 + 64 + 64 + 4)
        assert rows["needle", length, 1, "tiny"]["tokens_attended"] <= 1 + 1 + 16
        assert rows["needle", length, 1, "dense"]["share_attended"] == 1
        assert 0 < row["hit_rate"] < 1
        assert row["device_bytes_per_token"] < rows["needle", length, 1, "dense"]["device_bytes_per_token"] == 2048
    assert rows["needle", 1536, 1, "lrqk"]["share_attended"] < 0.4
    assert rows["needle", 512, 1, "lrqk"]["share_attended"] > 0.9


def test_perplexity_is_that_of_decode_steps(command, needle_folder, text):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    rows = rows_of(command[1])
    model = LlamaForCausalLM.from_pretrained(needle_folder).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(needle_folder).encode(text.read_text()))
    for length in (512, 1536):
        begins = [i * (len(ids) - length) // max(1, len(ids) // length - 1) for i in range(min(3, len(ids) // length))]
        losses = []
        for begin in begins:
            window = ids[begin : begin + length]
            with torch.no_grad():
                logits = model(window[None]).logits[0, -CONTINUATION - 1 : -1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[-CONTINUATION:]))
        expected = torch.stack(losses).mean().item()
        dense, lrqk, tiny = (rows["perplexity", length, 0, name] for name in ("dense", "lrqk", "tiny"))
        # float32 logits of up to 64 in two implementations
        assert math.log(dense["value"]) == pytest.approx(expected, abs=2e-3)
        assert abs(math.log(tiny["value"]) - expected) > 0.05
        if length == 512:
            assert math.log(lrqk["value"]) == pytest.approx(expected, abs=2e-3)


def test_divergence_is_from_the_distributions_of_dense_attention(command, needle_folder, text):
    """What dense attention kept is transformers' distribution; a covering selection hardly differs from it."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    rows = rows_of(command[1])
    dense, lrqk, tiny = (rows["perplexity", 512, 0, name] for name in ("dense", "lrqk", "tiny"))
    assert dense["divergence"] is None
    assert 0 <= abs(lrqk["divergence"]) < 1e-4 < 0.05 < tiny["divergence"]
    assert tiny["divergence_low"] <= tiny["divergence"] <= tiny["divergence_high"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(needle_folder).encode(text.read_text())[:512])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(needle_folder).eval()(ids[None]).logits[0, -CONTINUATION - 2 : -1]
    expected = logits.log_softmax(-1)
    kept = np.load(command[1] / "distributions" / f"{text.name}-512-0.npy")
    ours = torch.from_numpy(kept["logprob"])
    assert ours.shape == (CONTINUATION + 1, KEPT + 1) and expected.shape[1] > KEPT
    theirs = expected.gather(1, torch.from_numpy(kept["id"]).long())
    # float32 logits of up to 64 in two implementations
    torch.testing.assert_close(ours[:, :-1], theirs, rtol=1e-4, atol=5e-3)
    torch.testing.assert_close(ours.exp().sum(-1), torch.ones(CONTINUATION + 1))
    left = list((command[1] / "distributions").glob("*.divergence.npy"))
    assert not left


def test_goes_on_without_an_engine(command, monkeypatch):
    arguments, folder = command
    before = (folder / "records.jsonl").read_text()
    results = rows_of(folder)
    monkeypatch.setattr("vllm_lrqk.evaluation.run.Engine", lambda *_: pytest.fail("an engine was started"))
    main(arguments)
    assert (folder / "records.jsonl").read_text() == before
    assert rows_of(folder) == results
    with pytest.raises(SystemExit, match=r"dtype is \"bfloat16\", but the records in .* were made with \"float32\""):
        main([*arguments, "--dtype", "bfloat16"])


def test_vllm_refusals_are_passed_on(needle_folder, tmp_path):
    arguments = [str(needle_folder), "--tasks", "needle", "--lengths", "256", "--samples", "1"]
    arguments += ["--engine", '{"block_size": 32, "attention_backend": "LRQK"}', "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"--block-size is 32, but lrqk\.page_size is 256"):
        main(arguments)
