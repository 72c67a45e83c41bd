"""Scores over the share of the context that a decode step attends."""

from pathlib import Path

from vllm_lrqk.evaluation.arguments import DENSE
from vllm_lrqk.evaluation.report import Row


def plot(rows: list[Row], file: Path) -> None:
    """One panel per task (and turn), a line per length with its configurations, dense attention dashed."""
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.task, row.turn) for row in rows))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (task, turn) in zip(axes.flat, panels):
        chosen = [row for row in rows if (row.task, row.turn) == (task, turn)]
        for number, length in enumerate(sorted({row.length for row in chosen})):
            colour = f"C{number % 10}"
            points = [
                (row.share_attended, row.value)
                for row in chosen
                if row.length == length and row.configuration != DENSE and row.share_attended is not None
            ]
            shares, values = zip(*sorted(points)) if points else ((), ())
            axis.plot(shares, values, "o-", color=colour, label=f"{length:,} tokens")
            for row in (row for row in chosen if row.length == length and row.configuration == DENSE):
                axis.axhline(row.value, color=colour, linestyle="--", linewidth=1)
        axis.set(title=f"{task}, turn {turn}" if turn else task, xlabel="share of the context attended")
        axis.set_ylabel(chosen[0].metric)
        if chosen[0].metric == "score":
            axis.set_ylim(-0.05, 1.05)
        axis.legend(fontsize="small")
    figure.suptitle("dashed: dense attention")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
