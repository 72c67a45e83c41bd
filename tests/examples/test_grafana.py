"""The dashboard asks for series that exist, and for all of ours."""

import json
import re
from pathlib import Path

from vllm_lrqk.integration.metrics import HELP

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana.json"


def names_of(text: str) -> set[str]:
    """Names of series, without what Prometheus appends to counters and histograms."""
    return {re.sub("_(total|bucket)$", "", name) for name in re.findall(r"vllm:\w+", text)}


def test_series_exist() -> None:
    from vllm.v1.metrics import loggers

    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = names_of(" ".join(target["expr"] for panel in panels for target in panel["targets"]))
    own = {f"vllm:lrqk_{name}" for name in HELP}
    assert {name for name in asked if name.startswith("vllm:lrqk_")} == own
    assert asked - own <= set(re.findall(r'name="(vllm:\w+)"', Path(loggers.__file__).read_text()))
