"""The comparison of attention methods at equal device bytes."""

import io
import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vllm_lrqk.core.capture import LayerCapture
from vllm_lrqk.core.layer import LayerShape
from vllm_lrqk.core.step import build_step
from vllm_lrqk.evaluation.attention import main
from vllm_lrqk.evaluation.attention.budgets import QUEST_PAGE, Settings, Shape
from vllm_lrqk.evaluation.attention.decoding import paged_decode, published_decode
from vllm_lrqk.evaluation.attention.exact import ExactStep
from vllm_lrqk.evaluation.attention.generator import SETS, generate
from vllm_lrqk.evaluation.attention.measures import RowCache, evaluate
from vllm_lrqk.evaluation.attention.methods import METHODS, highest_possible, page_bounds
from vllm_lrqk.evaluation.attention.report import block_errors, plot, print_tables
from vllm_lrqk.evaluation.attention.sources import Source
from vllm_lrqk.evaluation.reference.published_attention import PublishedSettings
from vllm_lrqk.methods.lrqk.settings import LRQKSettings

STEPS = 10
SETTINGS = Settings(rank=16, page_size=32, sink_tokens=4, recent_tokens=32)
BUDGET = 0.5


@pytest.fixture(scope="module")
def qkv():
    """900 prompt tokens, 8 query heads, 2 KV heads of size 64."""
    return generate(replace(SETS["s1"], prompt_tokens=900, decode_tokens=STEPS))


@pytest.fixture(scope="module")
def results(qkv):
    found = evaluate(Source("small", [qkv]), list(METHODS), [BUDGET], SETTINGS, STEPS)
    return {result.method: result for result in found}


def exact_steps(qkv):
    key, value = qkv.key.float().transpose(0, 1), qkv.value.float().transpose(0, 1)
    return [ExactStep(qkv, key, value, index) for index in range(qkv.prompt_tokens, len(qkv.query))]


def test_exact_step_is_dense_attention(qkv):
    """Against torch's own attention. Tolerance: float32 sums in another order."""
    for exact in exact_steps(qkv)[:2]:
        seen = exact.num_tokens
        key, value = (x[:seen].float().transpose(0, 1).repeat_interleave(4, 0) for x in (qkv.key, qkv.value))
        query = qkv.query[exact.index].float()[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        torch.testing.assert_close(exact.output, expected, rtol=1e-4, atol=1e-5)
        everything = torch.ones(2, seen, dtype=torch.bool)
        torch.testing.assert_close(exact.attend(everything), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.has_residual])
def test_output_is_attention_to_the_rows_that_are_reported(qkv, name):
    """What recall, mass and misses are computed from is what the output came from.

    Tolerance: methods attend to the same bfloat16 rows, with float32 sums in another order.
    """
    plan = METHODS[name].plan(Shape.of(qkv, STEPS), int(BUDGET * Shape.of(qkv, STEPS).dense_bytes), SETTINGS)
    step = METHODS[name].start(qkv, plan, SETTINGS)
    for exact in exact_steps(qkv):
        attended = step(exact)
        assert attended.rows.shape == attended.always.shape
        assert not (attended.always & ~attended.rows).any()
        assert int((attended.rows & ~attended.always).sum(1).max()) <= plan.top_k
        torch.testing.assert_close(attended.output, exact.attend(attended.rows), rtol=1e-3, atol=1e-4)


def test_all_methods_fit(results):
    assert set(results) == set(METHODS)


def test_the_oracle_is_a_bound(results):
    oracle = results["oracle"]
    assert oracle.recall == 1.0
    others = [r for name, r in results.items() if name != "oracle" and not METHODS[name].has_residual]
    assert all(oracle.error < r.error and oracle.mass > r.mass and r.recall < 1.0 for r in others)


def test_random_finds_what_chance_finds(results):
    """k of n rows hit a given row with probability k / n; 20 draws of some 300 rows are within a tenth of that."""
    found = results["random"]
    candidates = 900 + STEPS / 2 - SETTINGS.sink_tokens - SETTINGS.recent_tokens
    assert found.recall == pytest.approx(found.top_k / candidates, rel=0.1)


def test_window_misses_nothing_and_random_does(results):
    assert results["window"].miss_rate == 0.0
    assert results["random"].miss_rate > 0.2
    assert results["lrqk"].miss_rate < results["random"].miss_rate


def test_residual_changes_the_output_only(results):
    with_residual, without = results["lrqk-mean"], results["lrqk-none"]
    assert with_residual.error < without.error
    assert results["lrqk"].error < without.error
    assert (with_residual.recall, with_residual.mass) == (without.recall, without.mass)


def test_selection_through_factors_beats_chance(results):
    """Page-local factors rank better than whole pages by bounds, and these better than chance."""
    assert results["lrqk"].recall > results["quest"].recall > results["random"].recall


def test_results_are_means_of_the_sequences(qkv, results):
    """Two sequences, of which one is the other with its query heads in reverse inside their groups."""
    order = [3, 2, 1, 0, 7, 6, 5, 4]
    both = Source("both", [qkv, replace(qkv, query=qkv.query[:, order])])
    for result in evaluate(both, ["quest", "oracle"], [BUDGET], SETTINGS, STEPS):
        alone = results[result.method]
        assert result.error == pytest.approx(alone.error, rel=1e-5)
        assert result.worst_head == pytest.approx(alone.worst_head, rel=1e-5)
        assert result.device_bytes == alone.device_bytes
        assert len(result.error_by_step) == STEPS


SHAPES = [Shape(8, 2, 64, 2, 900, 1000), Shape(32, 8, 128, 2, 30000, 32000), Shape(4, 4, 96, 4, 5000, 5100)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
@given(share=st.floats(0.01, 1.0))
def test_bytes_are_equal(name, shape, share):
    """No more than the budget, and less only by the row per head that does not fit, or where all rows are there.

    Of LoLA each row has a position, and sections are padded to 64 bytes.
    """
    budget = int(share * shape.dense_bytes)
    plan = METHODS[name].plan(shape, budget, SETTINGS)
    if plan is None:
        return
    assert plan.top_k >= 1
    assert plan.device_bytes <= budget
    heads = shape.heads if METHODS[name].is_per_query_head else shape.kv_heads
    most = shape.prompt_tokens if name == "published" else shape.tokens
    row_bytes = shape.row_bytes + 64 if name == "lola" else shape.row_bytes
    assert plan.hot_rows == most or budget - plan.device_bytes < heads * (row_bytes + 1)


@pytest.mark.parametrize("name", ["lrqk-mean", "quest", "random", "oracle"])
@pytest.mark.parametrize("share", [0.4, 0.9])
def test_the_cache_has_a_quarter_more_rows_than_a_step(name, share):
    shape = SHAPES[0]
    plan = METHODS[name].plan(shape, int(share * shape.dense_bytes), SETTINGS)
    always = {"lrqk-mean": 4 + 32 + 32, "quest": QUEST_PAGE, "random": 4 + 32, "oracle": 0}[name]
    spare = QUEST_PAGE if name == "quest" else 1
    assert 0 <= plan.hot_rows - (plan.top_k + always) * 5 / 4 < 5 / 4 * spare


def test_planned_bytes_are_the_objects_bytes(qkv):
    shape = Shape.of(qkv, STEPS)
    budget = int(BUDGET * shape.dense_bytes)
    for name, residual in (("lrqk", "linear"), ("lrqk-mean", "mean")):
        plan = METHODS[name].plan(shape, budget, SETTINGS)
        config = LRQKSettings(
            rank=16,
            page_size=32,
            top_k=plan.top_k,
            recent_tokens=32,
            sink_tokens=4,
            hot_rows=plan.hot_rows,
            residual=residual,
        )
        assert paged_decode(qkv, STEPS, config)[1].device_bytes() == plan.device_bytes
    plan = METHODS["published"].plan(shape, budget, SETTINGS)
    settings = PublishedSettings(plan.rank, plan.top_k, recent_tokens=32)
    assert published_decode(qkv, STEPS, settings)[1].device_bytes() == plan.device_bytes


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 40), sharpness=st.floats(0.01, 100))
def test_quest_bounds_are_upper_bounds(seed, size, sharpness):
    """Of every key of a page. Tolerance: rounding of float32 sums of 8 products."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(4 * size, 2, 8, generator=generator) * sharpness
    query = torch.randn(2, 3, 8, generator=generator)
    bound = highest_possible(query, *page_bounds(key, 4))  # [KV, G, P]
    scores = (query @ key.permute(1, 2, 0)).unflatten(-1, (-1, 4))
    assert bound.shape == scores.shape[:-1]
    assert (bound >= scores.amax(-1) - 1e-5 * sharpness * 8).all()


@given(
    steps=st.lists(st.sets(st.integers(0, 11), min_size=1, max_size=5), min_size=1, max_size=12),
    capacity=st.integers(5, 9),
)
def test_row_cache_is_least_recently_used(steps, capacity):
    """Against an ordered dictionary. Rows of one step leave in any order: only whole steps' sizes that fit are used."""
    cache, kept = RowCache(capacity, 1, 12 + len(steps)), OrderedDict()
    for number, rows in enumerate(steps):
        current = 12 + number
        mask = torch.zeros(1, current + 1, dtype=torch.bool)
        mask[0, [*rows, current]] = True
        expected = len([row for row in rows if row not in kept])
        assert cache.misses(mask) == expected
        for row in [*rows, current]:
            kept[row] = number
            kept.move_to_end(row)
        ages = sorted(kept.values(), reverse=True)
        if len(kept) > capacity:
            if ages[capacity - 1] == ages[capacity]:
                return  # which of the rows of one step go is not defined
            kept = OrderedDict((row, age) for row, age in kept.items() if age >= ages[capacity - 1])


def test_block_errors_are_means_of_tenths(results):
    result = replace(results["oracle"], error_by_step=[float(i) for i in range(205)])
    blocks = block_errors(result)
    assert len(blocks) == 10
    assert blocks[0] == pytest.approx(sum(range(20)) / 20)
    assert blocks[-1] == pytest.approx(sum(range(184, 205)) / 21)


def test_long_runs_are_shown_over_the_steps(results, tmp_path):
    result = replace(results["oracle"], error_by_step=[0.125] * 100 + [0.5] * 100)
    console = Console(width=160, record=True, file=io.StringIO())
    print_tables(console, [result], ["oracle"], [BUDGET])
    printed = console.export_text()
    assert "error of each tenth of 200 steps" in printed
    assert (printed.count("0.125"), printed.count("0.500")) == (5, 5)
    assert [path.name for path in plot(tmp_path, [result])] == ["error_over_bytes.png", "error_over_steps.png"]
    assert all(path.stat().st_size > 1000 for path in tmp_path.iterdir())


@pytest.fixture
def captured(qkv, tmp_path):
    """The sequence as an engine would have captured it."""
    shape = LayerShape(8, 2, 64, "bfloat16", 64**-0.5)
    capture = LayerCapture(tmp_path / "captured", "layer", shape, 10000)
    for start, end in [(0, 900), *((i, i + 1) for i in range(900, len(qkv.query)))]:
        table, slot_mapping = torch.tensor([[7]], dtype=torch.int32), torch.arange(end - start)
        lens = torch.tensor([end], dtype=torch.int32)
        step = build_step([0, end - start], [end], table, lens, slot_mapping, 1024)
        capture.write(qkv.query[start:end], qkv.key[start:end], qkv.value[start:end], step)
    return tmp_path / "captured"


def test_command_on_a_capture(captured, tmp_path, capsys, qkv):
    output = tmp_path / "results"
    options = ["--methods", "lrqk", "quest", "--budgets", "0.6", "0.1", "--page-size", "32", "--steps", str(STEPS)]
    main(["--source", str(captured), *options, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "captured: error of the attention output" in printed
    assert printed.count("does not fit") == 2
    written = json.loads((output / "attention.json").read_text())
    assert [(r["method"], r["budget"]) for r in written["results"]] == [("lrqk", 0.6), ("quest", 0.6)]
    assert written["settings"]["page_size"] == 32
    direct = evaluate(Source("direct", [qkv]), ["lrqk", "quest"], [0.6], Settings(page_size=32), STEPS)
    assert [r["error"] for r in written["results"]] == [r.error for r in direct]
    assert (output / "error_over_bytes.png").stat().st_size > 1000
    assert not (output / "error_over_steps.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "nowhere"], ["--source", "'nowhere'", "s1"]),
        (["--budgets", "0"], ["--budgets", "0", "above 0"]),
        (["--budgets", "1.5"], ["--budgets", "1.5"]),
        (["--steps", "0"], ["--steps", "0", "1 or more"]),
        (["--rank", "6"], ["rank", "6", "multiple of 4"]),
        (["--page-size", "100"], ["page_size", "100", "256"]),
        (["--methods", "magic"], ["--methods", "magic", "oracle"]),
        (["--source", "s1", "--rank", "128"], ["--rank", "128", "s1", "64"]),
        (["--source", "s1", "--budgets", "0.05", "--methods", "lrqk", "--steps", "1"], ["no method fits", "5%"]),
    ],
    ids=str,
)
def test_mistakes_end_with_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err.strip()
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_capture_that_is_too_short(captured, capsys):
    with pytest.raises(SystemExit):
        main(["--source", str(captured), "--steps", "11"])
    assert "has 10 decoded tokens: lower --steps" in capsys.readouterr().err
