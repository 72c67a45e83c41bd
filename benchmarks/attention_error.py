"""Error of the attention output against dense attention, on synthetic Q/K/V, beside GPU bytes.

    python benchmarks/attention_error.py --sets s1 s2 s3 s4 --json errors.json

Every configuration decodes the same steps after the same prompt. The error is the mean over steps and query heads
of |o - o_dense| / |o_dense|. GPU bytes are factors plus hot rows (see docs/measurements.md).
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from vllm_lrqk.core.rotary import RotaryTable  # noqa: E402
from vllm_lrqk.evaluation.attention.aqua import aqua_decode  # noqa: E402
from vllm_lrqk.evaluation.attention.decoding import (  # noqa: E402
    CalibratedLayer,
    PagedLayer,
    calibrated_on_prompt,
    dense_decode,
    paged_decode,
    published_decode,
    relative_error,
)
from vllm_lrqk.evaluation.attention.generator import SETS, QKVSet, generate  # noqa: E402
from vllm_lrqk.evaluation.attention.lola import lola_decode  # noqa: E402
from vllm_lrqk.evaluation.attention.qkv import QKV  # noqa: E402
from vllm_lrqk.evaluation.reference.published_attention import PublishedSettings  # noqa: E402
from vllm_lrqk.methods.aqua.settings import AquaSettings  # noqa: E402
from vllm_lrqk.methods.lola.settings import LolaSettings  # noqa: E402
from vllm_lrqk.methods.lrqk.settings import LRQKSettings  # noqa: E402

TOP_K, RECENT_TOKENS = 512, 64
BASELINE = "published, rank 32"
"""What bytes are relative to."""


def paged(**values: int | float | str) -> LRQKSettings:
    """A page-local configuration; `values` are what differs from the default with TOP_K."""
    return LRQKSettings(**{"top_k": TOP_K, "recent_tokens": RECENT_TOKENS, "sink_tokens": 4, **values})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Calibrated:
    """Factors of 32 columns, half of them in 4 bits, in a basis calibrated on a share of the prompt."""

    has_value_map: bool
    """Each page has its own; else the calibration's serves all."""
    share: float = 1.0
    page_size: int = 256

    def decode(self, spec: QKVSet, qkv: QKV, steps: int) -> tuple[torch.Tensor, PagedLayer]:
        config = paged(page_size=self.page_size)
        rotary = RotaryTable.from_base(spec.rope_base, spec.head_size, len(qkv.query) + self.page_size)
        tokens = round(self.share * qkv.prompt_tokens)
        basis = calibrated_on_prompt(qkv, rotary, 32, self.page_size, tokens)
        layer = CalibratedLayer(qkv, qkv.prompt_tokens + steps, config, basis, self.has_value_map)
        return paged_decode(qkv, steps, config, layer=layer)


Configuration = LRQKSettings | PublishedSettings | Calibrated | AquaSettings | LolaSettings
CONFIGURATIONS: dict[str, Configuration] = {
    BASELINE: PublishedSettings(rank=32, top_k=TOP_K, recent_tokens=RECENT_TOKENS),
    "published, rank 16": PublishedSettings(rank=16, top_k=TOP_K, recent_tokens=RECENT_TOKENS),
    "default": paged(),
    "residual mean": paged(residual="mean"),
    "residual none": paged(residual="none"),
    "value_rank 4": paged(value_rank=4),
    "value_rank 8": paged(value_rank=8),
    "key_pca": paged(factorization="key_pca"),
    "key_pca, mean": paged(factorization="key_pca", residual="mean"),
    "key_pca, none": paged(factorization="key_pca", residual="none"),
    "top_k 256": paged(top_k=256),
    "top_k 1024": paged(top_k=1024),
    "top_k 1024, mean": paged(top_k=1024, residual="mean"),
    "top_k 1024, none": paged(top_k=1024, residual="none"),
    "1 iteration": paged(iterations=1),
    "2 iterations": paged(iterations=2),
    "lambda 0.01": paged(lambda_q=0.01, lambda_k=0.01),
    "lambda 100": paged(lambda_q=100.0, lambda_k=100.0),
    "bfloat16 factors": paged(factor_dtype="bfloat16"),
    "rank 8": paged(rank=8),
    "rank 32": paged(rank=32),
    "rank 32, value_rank 16": paged(rank=32, value_rank=16),
    "rank 32, mean": paged(rank=32, residual="mean"),
    "page size 64": paged(page_size=64),
    "page size 128": paged(page_size=128),
    "page size 512": paged(page_size=512),
    "page size 64, mean": paged(page_size=64, residual="mean"),
    "page size 128, mean": paged(page_size=128, residual="mean"),
    "page size 512, mean": paged(page_size=512, residual="mean"),
    "16 recent tokens": paged(recent_tokens=16),
    "256 recent tokens": paged(recent_tokens=256),
    "no sink tokens": paged(sink_tokens=0),
    **{f"top_k 1024, top_p {share}": paged(top_k=1024, top_p=share) for share in (0.9, 0.8, 0.7, 0.6)},
    "calibrated": Calibrated(has_value_map=True),
    "calibrated, values too": Calibrated(has_value_map=False),
    "calibrated on half": Calibrated(has_value_map=True, share=0.5),
    "half, values too": Calibrated(has_value_map=False, share=0.5),
    "AQUA 1.0": AquaSettings(keep=1.0),
    **{f"AQUA {keep}": AquaSettings(keep=keep) for keep in (0.875, 0.75, 0.625, 0.5, 0.25)},
    **{f"AQUA {keep}, query_head": AquaSettings(keep=keep, choose="query_head") for keep in (0.75, 0.5, 0.25)},
    "AQUA 1.0, stored 0.75": AquaSettings(keep=1.0, stored=0.75),
    "AQUA 0.75, stored 0.75": AquaSettings(keep=0.75, stored=0.75),
    "AQUA 1.0, int8": AquaSettings(keep=1.0, key_dtype="int8"),
    "AQUA 0.5, int8": AquaSettings(keep=0.5, key_dtype="int8"),
    "LoLA": LolaSettings(),
    "LoLA, cache 764": LolaSettings(cache=764),
    "LoLA, cache at random": LolaSettings(select="random"),
    "window 492": LolaSettings(window=416, cache=12, state="none"),
}


def measure(spec: QKVSet, qkv: QKV, dense: torch.Tensor, steps: int, configuration: Configuration) -> dict[str, float]:
    """Mean and worst head's relative error, GPU bytes and, of ours, rows attended per step and KV head."""
    if isinstance(configuration, PublishedSettings):
        output, published, _ = published_decode(qkv, steps, configuration)
        figures = {"device_bytes": published.device_bytes()}
    elif isinstance(configuration, AquaSettings):
        output, device_bytes = aqua_decode(qkv, steps, configuration)
        figures = {"device_bytes": device_bytes}
    elif isinstance(configuration, LolaSettings):
        output, device_bytes = lola_decode(qkv, steps, configuration)
        figures = {"device_bytes": device_bytes}
    else:
        if isinstance(configuration, Calibrated):
            output, layer = configuration.decode(spec, qkv, steps)
        else:
            output, layer = paged_decode(qkv, steps, configuration)
        figures = {"device_bytes": layer.device_bytes(), "rows_attended": fmean(layer.rows_attended)}
    error = relative_error(output, dense)
    return {"error": float(error.mean()), "worst_head": float(error.mean(0).max()), **figures}


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """One row per configuration, one column per set: error (worst head) and bytes relative to the first row."""
    sets = list(results)
    print(f"| {'configuration':25} | " + " | ".join(f"{name:19}" for name in sets) + " |")
    print("|" + "---|" * (len(sets) + 1))
    for name in next(iter(results.values())):
        cells = []
        for of_set in results.values():
            cell, baseline = of_set[name], of_set[BASELINE]
            share = cell["device_bytes"] / baseline["device_bytes"]
            cells.append(f"{cell['error']:.4f} ({cell['worst_head']:.3f}) {share:.2f}")
        print(f"| {name:25} | " + " | ".join(f"{cell:19}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="sets of the generator")
    parser.add_argument("--steps", type=int, default=24, help="decode steps")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, metavar="CONFIGURATION", help="leave out others")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if not 1 <= arguments.steps <= min(SETS[name].decode_tokens for name in arguments.sets):
        parser.error(f"--steps is {arguments.steps}, but must lie between 1 and the decode tokens of every set")
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    chosen = {
        name: CONFIGURATIONS[name] for name in CONFIGURATIONS if name in (BASELINE, *(arguments.only or CONFIGURATIONS))
    }
    with tqdm(total=len(arguments.sets) * len(chosen), unit="run") as progress:
        for name in arguments.sets:
            qkv = generate(SETS[name])
            dense = dense_decode(qkv, arguments.steps)
            results[name] = {}
            for configuration, settings in chosen.items():
                progress.set_description(f"{name} {configuration}")
                results[name][configuration] = measure(SETS[name], qkv, dense, arguments.steps, settings)
                progress.update()
    print_table(results)
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": arguments.steps, "sets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
