"""Records as one table: rows of task and length, a line per configuration."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from vllm_lrqk.evaluation.arguments import DENSE
from vllm_lrqk.evaluation.prompts import PERPLEXITY
from vllm_lrqk.evaluation.records import Record
from vllm_lrqk.evaluation.statistics import mean_interval, mean_score, paired_interval, perplexity

ALL_TASKS = "all tasks"
BYTES = ("device bytes/token", "per request")
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
    tokens_attended: float | None
    """Per KV head, layer and decode step; None where the method does not count them."""
    share_attended: float | None
    """`tokens_attended` over the prompts' tokens."""
    device_bytes_per_token: float
    device_bytes_per_request: float
    """Of all of a prompt's tokens, and what a request takes beside them."""
    hit_rate: float | None
    """None without a hot cache."""
    divergence: float | None
    """Of a perplexity: mean Kullback-Leibler divergence from dense attention per token, in nats."""
    divergence_low: float | None
    divergence_high: float | None
    """Its 95 % confidence interval."""


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
    divergences = [record.divergence for record in every if record.divergence is not None]
    mean, divergence_low, divergence_high = mean_interval(divergences) or (None, None, None)
    per_token = every[0].device_bytes_per_token
    tokens_attended: float | None = None
    if configuration == DENSE:
        tokens_attended = prompt_tokens
    elif any(record.rows_attended is not None for record in every):
        tokens_attended = attended / steps if steps else 0.0
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
        share_attended=None if tokens_attended is None else tokens_attended / prompt_tokens,
        device_bytes_per_token=per_token,
        device_bytes_per_request=per_token * prompt_tokens + every[0].device_bytes_per_request,
        hit_rate=hit / (hit + missed) if hit + missed else None,
        divergence=mean,
        divergence_low=divergence_low,
        divergence_high=divergence_high,
    )


def table(found: list[Row]) -> Table:
    """The rows for a terminal."""
    shown = Table(title="scores 0 to 1, perplexity as such; differences to dense attention, 95 % interval")
    for heading in ("task", "length", "configuration"):
        shown.add_column(heading, justify="left" if heading != "length" else "right")
    for heading in ("score", "difference", "interval", "samples", "tokens attended", *BYTES, "hit rate", "KL to dense"):
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
            "" if row.tokens_attended is None else f"{row.tokens_attended:,.0f} ({row.share_attended:.1%})",
            f"{row.device_bytes_per_token:,.0f}",
            f"{row.device_bytes_per_request:,.0f}",
            "" if row.hit_rate is None else f"{row.hit_rate:.1%}",
            "" if row.divergence is None else f"{row.divergence:.5f}",
        )
        previous = place
    return shown
