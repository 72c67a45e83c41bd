import json

import pytest

from vllm_lrqk.evaluation.errors import EvaluationError
from vllm_lrqk.evaluation.records import Record, Store, fingerprint
from vllm_lrqk.evaluation.report import ALL_TASKS, rows

SETTINGS = {"model": "m", "dtype": "auto", "configurations": {"lrqk": {"lrqk": {"top_k": 8}}}, "files": {}}


def record(configuration="lrqk", task="qa", length=512, seed=0, turn=0, score=1.0, **counts):
    return Record(configuration, task, length, seed, turn, score, "text", 500, 26.0, **counts)


def test_records_survive(tmp_path):
    Store(tmp_path, SETTINGS).add([record(), record(seed=1, score=0.5)])
    Store(tmp_path, SETTINGS).add([record(seed=2)])
    found = Store(tmp_path, SETTINGS).records
    assert [found["lrqk", "qa", 512, seed, 0].score for seed in range(3)] == [1, 0.5, 1]


def test_half_a_line_is_dropped(tmp_path):
    Store(tmp_path, SETTINGS).add([record()])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"configuration": "lr')
    store = Store(tmp_path, SETTINGS)
    store.add([record(seed=1)])
    assert len(Store(tmp_path, SETTINGS).records) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, 'model is "other", but the records in .* were made with "m"'),
        ({"configurations": {"lrqk": {"lrqk": {"top_k": 9}}}}, r'configurations.lrqk is .*"top_k": 9'),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, message):
    Store(tmp_path, SETTINGS)
    with pytest.raises(EvaluationError, match=message):
        Store(tmp_path, SETTINGS | change)


def test_configurations_may_be_added(tmp_path):
    Store(tmp_path, SETTINGS)
    Store(tmp_path, SETTINGS | {"configurations": {"more": {"lrqk": {}}}})
    kept = json.loads((tmp_path / "settings.json").read_text())["configurations"]
    assert sorted(kept) == ["lrqk", "more"]


def test_a_model_is_known_by_its_content(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3 << 20))
    before = fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_text("of no matter")
    assert fingerprint(tmp_path) == before
    weights.write_bytes(bytes((3 << 20) - 1) + b"1")
    assert fingerprint(tmp_path) != before


def test_rows_pair_the_same_samples():
    records = [record("dense", seed=seed, score=1.0) for seed in range(4)]
    records += [record(seed=seed, score=0.5, steps=4.0, rows_attended=40.0 * seed) for seed in range(2, 6)]
    dense, lrqk = rows(records)
    assert (dense.configuration, dense.value, dense.difference, dense.tokens_attended) == ("dense", 1, None, 500)
    assert (lrqk.samples, lrqk.value, lrqk.difference) == (4, 0.5, -0.5)
    assert lrqk.tokens_attended == (2 + 3 + 4 + 5) * 40 / 16
    assert lrqk.share_attended == lrqk.tokens_attended / 500
    assert lrqk.hit_rate is None


def test_rows_for_all_tasks_leave_perplexity_out():
    tasks = {"qa": 1.0, "copy": 0.5, "perplexity text": 3.0}
    cases = [(name, task, seed) for name in ("dense", "x") for task in tasks for seed in (0, 1)]
    records = [record(name, task, seed=seed, score=tasks[task]) for name, task, seed in cases]
    last = rows(records)[-2:]
    assert [(row.task, row.value, row.samples) for row in last] == [(ALL_TASKS, 0.75, 4)] * 2
    assert rows(records[:2])[-1].task == "qa"


def test_rows_of_a_method_that_counts_nothing():
    """Rows attended are unknown, not none; bytes are those of the prompt's tokens and of the request."""
    found = Record("lola", "qa", 512, 0, 0, 1.0, "text", 500, 0.0, 4096.0)
    (row,) = rows([found])
    assert (row.tokens_attended, row.share_attended, row.hit_rate) == (None, None, None)
    assert (row.device_bytes_per_token, row.device_bytes_per_request) == (0, 4096)
    (row,) = rows([record(rows_attended=0.0, steps=0.0)])  # an answer of one token: no decode step
    assert (row.tokens_attended, row.device_bytes_per_request) == (0, 26 * 500)


def test_rows_of_divergences():
    task = "perplexity text"
    dense = [record("dense", task, seed=seed, score=2.0) for seed in range(3)]
    ours = [record("lrqk", task, seed=seed, score=2.0, divergence=0.25 * seed) for seed in range(3)]
    first, second = rows(dense + ours)
    assert first.divergence is None
    assert second.divergence == 0.25
    assert 0 <= second.divergence_low < second.divergence < second.divergence_high <= 0.5


def test_old_records_are_read(tmp_path):
    """Fields that came later have defaults."""
    line = json.dumps({key: value for key, value in vars(record()).items() if "divergence" not in key})
    Store(tmp_path, SETTINGS)
    (tmp_path / "records.jsonl").write_text(line + "\n")
    assert Store(tmp_path, SETTINGS).records["lrqk", "qa", 512, 0, 0].divergence is None
