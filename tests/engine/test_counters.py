"""The numbers a user sees: one line at start-up, one per logging interval, and the counters behind them."""

import re

import pytest
from engines import counters, engine, greedy, tiny_llama, token_prompts

pytestmark = pytest.mark.engine


@pytest.fixture
def log_lines(monkeypatch):
    """Lines of the plugin's logger, written at every step."""
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", "0")
    from vllm_lrqk.integration import report

    lines = []
    monkeypatch.setattr(report.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def numbers(line):
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def test_lines_and_counters(models, log_lines):
    model = tiny_llama(models, 4, 2, 64)
    settings = {"page_size": 64, "rank": 16, "top_k": 32, "recent_tokens": 8, "hot_cache": True, "host_memory_gib": 0.1}
    with engine(model, settings) as llm:
        start = [line for line in log_lines if "device bytes" in line]
        greedy(llm, token_prompts([200, 300], seed=1), 12)
        counted = counters(llm)
    assert len(start) == 1
    device, host, room, host_room, device_room, dense = numbers(start[0].partition("kernels")[2])
    assert host == 2 * 2 * 2 * 64 * 4  # layers, KV heads, key and value, head size, float32
    # A; per 64-token page X, scales and mean value, value projection, its scales and the mean of A
    assert device == 2 * 2 * (16 + (16 * 64 + 64 + 128 + 16 * 64 + 64 + 64) / 64)
    assert room == host_room == (int(0.1 * 2**30) // (host * 64) - 1) * 64
    assert device_room > room
    assert dense == int(device_room * device / host)

    steps = [numbers(line) for line in log_lines if "rows attended" in line]
    assert len(steps) > 10
    attended, hit, missed, _, fetched_mib, _, pages = zip(*steps)
    # The lines are written when a step begins: the last step's counts are not in any of them.
    assert 0 < sum(attended) < counted["rows_attended"]
    assert 0 < sum(hit) < counted["rows_hit"]
    assert 0 < sum(missed) <= counted["rows_missed"]
    assert max(pages) == 4 + 5  # 200 + 12 and 300 + 12 tokens in pages of 64
    assert counted["bytes_fetched"] == counted["rows_missed"] * 2 * 64 * 4
    assert sum(fetched_mib) <= counted["bytes_fetched"] / 2**20 + 0.05 * len(steps)
    # Every attended row was looked up, but for the new token's own, which is in device memory already.
    assert counted["rows_hit"] + counted["rows_missed"] == counted["rows_attended"] - counted["decode_tokens"] * 2
