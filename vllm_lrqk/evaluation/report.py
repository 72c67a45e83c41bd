"""Records as one table: rows of task and length, a line per configuration."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from vllm_lrqk.evaluation.arguments import DENSE
from vllm_lrqk.evaluation.prompts import PERPLEXITY
from vllm_lrqk.evaluation.records import Record
from vllm_lrqk.evaluation.statistics import mean_score, paired_interval, perplexity

ALL_TASKS = "all tasks"
Samples = dict[str, dict[tuple[str, int, int], Record]]
"""Records by configuration and by (task, seed, turn)."""


@dataclass(frozen=True)
class Row:
    """One configuration at one task, length and turn (0: no turns)."""

    task: str
    length: int
    turn: int
    configuration: str
    metric: str
    """"score" (0 to 1, more is better) or "perplexity" (less is better)."""
    samples: int
    value: float
    difference: float | None
    """To dense attention on the same samples; None for dense attention itself and for a single sample."""
    low: float | None
    high: float | None
    """The difference's 95 % confidence interval."""
    tokens_attended: float
    """Per KV head, layer and decode step."""
    share_attended: float
    """`tokens_attended` over the prompts' tokens."""
    device_bytes_per_token: float
    hit_rate: float | None
    """None without a hot cache."""


def rows(records: Iterable[Record]) -> list[Row]:
    """One row per task, length, turn and configuration; tasks and configurations in the order of the records.

    Where one length has several scored tasks, rows for all of them together come last.
    """
    groups: dict[tuple[str, int, int], Samples] = {}
    together: dict[int, Samples] = {}
    for record in records:
        sample = record.task, record.seed, record.turn
        group = groups.setdefault((record.task, record.length, record.turn), {})
        group.setdefault(record.configuration, {})[sample] = record
        if not record.task.startswith(PERPLEXITY):
            together.setdefault(record.length, {}).setdefault(record.configuration, {})[sample] = record
    tasks = list(dict.fromkeys(task for task, _, _ in groups))
    places = sorted(groups, key=lambda place: (tasks.index(place[0]), place[1:]))
    found = [_row(*place, name, groups[place]) for place in places for name in groups[place]]
    for length in sorted(together):
        if len({task for samples in together[length].values() for task, _, _ in samples}) > 1:
            found += [_row(ALL_TASKS, length, 0, name, together[length]) for name in together[length]]
    return found


def _row(task: str, length: int, turn: int, configuration: str, group: Samples) -> Row:
    samples, dense = group[configuration], group.get(DENSE, {})
    statistic = perplexity if task.startswith(PERPLEXITY) else mean_score
    interval = None
    if configuration != DENSE:
        paired = [sample for sample in samples if sample in dense]
        ours, theirs = ([side[sample].score for sample in paired] for side in (samples, dense))
        interval = paired_interval(ours, theirs, statistic)
    difference, low, high = interval or (None, None, None)
    every = list(samples.values())
    prompt_tokens = sum(record.prompt_tokens for record in every) / len(every)
    names = ("steps", "rows_attended", "rows_hit", "rows_missed")
    steps, attended, hit, missed = (sum(getattr(record, name) or 0 for record in every) for name in names)
    tokens_attended = prompt_tokens if configuration == DENSE else attended / steps if steps else 0.0
    return Row(
        task=task,
        length=length,
        turn=turn,
        configuration=configuration,
        metric="perplexity" if statistic is perplexity else "score",
        samples=len(every),
        value=float(statistic(np.array([record.score for record in every]))),
        difference=difference,
        low=low,
        high=high,
        tokens_attended=tokens_attended,
        share_attended=tokens_attended / prompt_tokens,
        device_bytes_per_token=every[0].device_bytes_per_token,
        hit_rate=hit / (hit + missed) if hit + missed else None,
    )


def table(found: list[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(title="scores 0 to 1, perplexity as such; differences to dense attention, 95 % interval")
    for heading in ("task", "length", "configuration"):
        shown.add_column(heading, justify="left" if heading != "length" else "right")
    for heading in ("score", "difference", "interval", "samples", "tokens attended", "device bytes/token", "hit rate"):
        shown.add_column(heading, justify="right")
    previous = None
    for row in found:
        place = (row.task, row.length, row.turn)
        name = f"{row.task}, turn {row.turn}" if row.turn else row.task
        shown.add_row(
            *((name, f"{row.length:,}") if place != previous else ("", "")),
            row.configuration,
            f"{row.value:,.3f}",
            "" if row.difference is None else f"{row.difference:+,.3f}",
            "" if row.low is None else f"{row.low:+,.3f} to {row.high:+,.3f}",
            str(row.samples),
            f"{row.tokens_attended:,.0f} ({row.share_attended:.0%})",
            f"{row.device_bytes_per_token:,.0f}",
            "" if row.hit_rate is None else f"{row.hit_rate:.1%}",
        )
        previous = place
    return shown
