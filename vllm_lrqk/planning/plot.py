"""Requests over the length of their contexts."""

from collections.abc import Sequence
from pathlib import Path

from vllm_lrqk.planning.plan import DENSE, Plan, lengths_up_to


def plot(plans: Sequence[Plan], name: str, file: Path) -> None:
    """One line per method, dense attention dashed; lengths double from 1,024 on."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    for plan in plans:
        lengths = lengths_up_to(plan.length)
        requests = [plan.capacity.requests(length) for length in lengths]
        axis.plot(lengths, requests, "--" if plan.method == DENSE else "o-", label=plan.method)
    axis.set_xscale("log", base=2)
    axis.set_yscale("symlog", base=2, linthresh=1)
    axis.set(xlabel="tokens of a request", ylabel="requests at once", title=name)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
