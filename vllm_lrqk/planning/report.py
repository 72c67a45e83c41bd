"""A plan as a table."""

from collections.abc import Sequence

from rich.table import Table

from vllm_lrqk.core.host_memory import GIB
from vllm_lrqk.planning.deployment import Deployment
from vllm_lrqk.planning.plan import Plan


def table(plans: Sequence[Plan], deployment: Deployment) -> Table:
    """One line per method."""
    device = "for the pool" if deployment.device_memory_gib is None else f"{deployment.device_memory_gib:g} GiB"
    title = (
        f"requests of {deployment.max_model_len:,} tokens; device memory of a rank: {device}, "
        f"host memory of a host: {deployment.host_memory_gib:g} GiB"
    )
    found = Table(title=title, title_justify="left", caption_justify="left")
    found.caption = (
        "Per rank. Attention per step: of one request, estimated as bytes over "
        f"{deployment.device_bandwidth / 1e9:g} GB/s (device) and {deployment.host_bandwidth / 1e9:g} GB/s (to the "
        "host, nothing found in the hot cache); no weights, no launches."
    )
    found.add_column("method")
    for name in ("device B/token", "host B/token", "per request", "requests", "limit", "tokens in all", "per step"):
        found.add_column(name, justify="left" if name == "limit" else "right")
    for plan in plans:
        room = plan.capacity
        constant = room.device_bytes_per_request + plan.window_bytes_per_request
        found.add_row(
            plan.method,
            f"{room.device_bytes_per_token:,}" if room.device_bytes_per_token else "none",
            f"{room.host_bytes_per_token:,}" if room.host_bytes_per_token else "none",
            _gib(constant) if constant else "none",
            f"{plan.requests:,}",
            room.limit(plan.length),
            f"{room.tokens(plan.length):,}",
            f"{plan.step_seconds * 1000:,.3g} ms",
        )
    return found


def _gib(size: int) -> str:
    return f"{size / GIB:,.3g} GiB" if size >= GIB else f"{size / 2**20:,.3g} MiB"
