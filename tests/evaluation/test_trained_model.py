"""The model that comes with the package: what it answers with dense attention, it answers with LRQK."""

import json

import pytest

from vllm_lrqk.evaluation.arguments import SHIPPED_MODEL
from vllm_lrqk.evaluation.command import main

pytestmark = pytest.mark.engine

# A quarter of the text; and too little to find anything.
LRQK = {"top_k": 256, "page_size": 64, "residual": "linear"}
TINY = {"top_k": 1, "recent_tokens": 1, "sink_tokens": 0, "page_size": 16, "rank": 4, "residual": "none"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    text = folder / "text.py"
    text.write_text("\n".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(400)))
    arguments = ["--tasks", "niah_single", "copy", "--lengths", "1024", "--samples", "6", "--decode-question"]
    arguments += ["--perplexity", str(text), "--continuation", "32", "--dtype", "float32"]
    arguments += ["--config", f"lrqk={json.dumps(LRQK)}", "--config", f"tiny={json.dumps(TINY)}"]
    arguments += ["--config", 'lola={"backend": "LOLA"}']
    arguments += ["--output", str(folder)]
    main(arguments)
    results = json.loads((folder / "results.json").read_text())
    return {(row["task"].split()[0], row["configuration"]): row for row in results}


def test_shipped_model_is_small():
    weights = SHIPPED_MODEL / "model.safetensors"
    assert weights.stat().st_size < 16e6


def test_answers(rows):
    assert rows["niah_single", "dense"]["value"] >= 0.8
    assert rows["niah_single", "lrqk"]["value"] >= rows["niah_single", "dense"]["value"]
    assert rows["niah_single", "tiny"]["value"] < rows["niah_single", "dense"]["value"] - 0.4
    # A third of the text is attended; a copy may differ in a word where two continuations are about as likely.
    assert rows["copy", "lrqk"]["value"] >= rows["copy", "dense"]["value"] - 0.05
    assert rows["copy", "tiny"]["value"] < rows["copy", "dense"]["value"] - 0.2


def test_perplexity(rows):
    dense, lrqk, tiny = (rows["perplexity", name]["value"] for name in ("dense", "lrqk", "tiny"))
    assert lrqk / dense == pytest.approx(1, abs=0.01)
    assert tiny / dense > 1.05


def test_another_method_joins(rows):
    """LoLA, which keeps a state of one size: compared with dense attention as LRQK is."""
    assert rows["perplexity", "lola"]["samples"] == rows["perplexity", "dense"]["samples"]
    assert rows["perplexity", "lola"]["divergence"] > 0
    row = rows["niah_single", "lola"]
    assert row["device_bytes_per_token"] == 0 < row["device_bytes_per_request"]
    assert row["tokens_attended"] is None and row["samples"] == 6
