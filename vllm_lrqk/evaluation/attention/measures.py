"""What is measured at each decode step, and the run that measures it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_lrqk.evaluation.attention.budgets import Plan, Settings, Shape
from vllm_lrqk.evaluation.attention.decoding import relative_error
from vllm_lrqk.evaluation.attention.exact import ExactStep
from vllm_lrqk.evaluation.attention.methods import METHODS, Attended, heaviest_rows
from vllm_lrqk.evaluation.attention.qkv import QKV
from vllm_lrqk.evaluation.attention.sources import Source


@dataclass(frozen=True)
class Result:
    """One method at one budget, averaged over the sequences of a source."""

    source: str
    method: str
    budget: float
    """Share of the bytes of all keys and values."""
    device_bytes: float
    dense_bytes: float
    rank: float | None
    top_k: float
    rows: float
    """Rows attended per step and selecting head."""
    error: float
    """Mean over steps and query heads of |o - o_dense| / |o_dense|."""
    worst_head: float
    """The same mean over steps for the worst query head of all sequences."""
    recall: float
    """Share of the k selected rows that are among the k heaviest of the tokens to select from."""
    mass: float
    """Share of the softmax weight of dense attention on the attended rows."""
    miss_rate: float
    """Rows that the hot cache does not have, over rows attended; the first step is left out."""
    error_by_step: list[float]


class RowCache:
    """The hot cache: the rows that were attended last, `capacity` per selecting head, empty at first."""

    def __init__(self, capacity: int, heads: int, max_tokens: int) -> None:
        self.capacity = min(capacity, max_tokens)
        self._last_used = torch.full((heads, max_tokens), -1)
        self._is_resident = torch.zeros(heads, max_tokens, dtype=torch.bool)
        self._step = 0

    def misses(self, rows: torch.Tensor) -> int:
        """Attend to bool [S, L]; the last token's row was just computed and is no miss."""
        length = rows.shape[1]
        missed = rows & ~self._is_resident[:, :length]
        missed[:, -1] = False
        self._last_used[:, :length][rows] = self._step
        self._is_resident = heaviest_rows(self._last_used, self.capacity) & (self._last_used >= 0)
        self._step += 1
        return int(missed.sum())


def recall(attended: Attended, exact: ExactStep) -> float:
    """Mean over selecting heads of |selected and true top-k| / k, of k selected rows; 1 where nothing is selected."""
    weight = exact.weight_for(len(attended.rows)).masked_fill(attended.always, -1.0)
    selected = attended.rows & ~attended.always
    shares = []
    for chosen, candidates in zip(selected, weight):
        k = int(chosen.sum())
        shares.append(float((heaviest_rows(candidates[None], k)[0] & chosen).sum()) / k if k else 1.0)
    return sum(shares) / len(shares)


@dataclass
class _Run:
    """Measures of one method at one budget on one sequence."""

    plan: Plan
    errors: list[torch.Tensor] = field(default_factory=list)
    recalls: list[float] = field(default_factory=list)
    masses: list[float] = field(default_factory=list)
    rows: list[float] = field(default_factory=list)
    missed: int = 0
    looked_up: int = 0

    def add(self, exact: ExactStep, attended: Attended, missed: int) -> None:
        num_rows = int(attended.rows.sum())
        if self.errors:
            self.missed += missed
            self.looked_up += num_rows
        self.errors.append(relative_error(attended.output, exact.output))
        self.recalls.append(recall(attended, exact))
        self.masses.append(float((exact.weight * exact.per_query_head(attended.rows)).sum(1).mean()))
        self.rows.append(num_rows / len(attended.rows))


def _run_sequence(
    qkv: QKV, runs: list[tuple[str, _Run]], settings: Settings, progress: Callable[[int], object]
) -> None:
    """All methods side by side, so that dense attention is computed once per step."""
    key, value = qkv.key.float().transpose(0, 1), qkv.value.float().transpose(0, 1)
    active = []
    for name, run in runs:
        heads = qkv.query.shape[1] if METHODS[name].is_per_query_head else len(key)
        cache = RowCache(run.plan.hot_rows, heads, len(qkv.query))
        active.append((run, METHODS[name].start(qkv, run.plan, settings), cache))
    for index in range(qkv.prompt_tokens, len(qkv.query)):
        exact = ExactStep(qkv, key, value, index)
        for run, step, cache in active:
            attended = step(exact)
            run.add(exact, attended, cache.misses(attended.rows))
        progress(len(active))


def evaluate(
    source: Source,
    methods: list[str],
    shares: list[float],
    settings: Settings,
    steps: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Result]:
    """Every method at every budget that it fits into on all sequences; others have no result.

    Args:
        methods: keys of METHODS.
        shares: budgets, as shares of the bytes of all keys and values at the end of the run.
        progress: called with the method steps done since the last call.
    """
    runs: dict[tuple[str, float], list[_Run]] = {}
    shapes = [Shape.of(qkv, steps) for qkv in source.sequences]
    for qkv, shape in zip(source.sequences, shapes):
        end = shape.tokens
        started = []
        for name in methods:
            for share in shares:
                plan = METHODS[name].plan(shape, int(share * shape.dense_bytes), settings)
                if plan is not None:
                    started.append((name, _Run(plan)))
                    runs.setdefault((name, share), []).append(started[-1][1])
        cut = QKV(qkv.query[:end], qkv.key[:end], qkv.value[:end], qkv.prompt_tokens)
        _run_sequence(cut, started, settings, progress)
    dense = sum(shape.dense_bytes for shape in shapes) / len(shapes)
    return [
        _result(source.name, name, share, dense, of_all)
        for (name, share), of_all in runs.items()
        if len(of_all) == len(shapes)
    ]


def _result(source: str, method: str, budget: float, dense_bytes: float, runs: list[_Run]) -> Result:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    errors = [torch.stack(run.errors) for run in runs]  # [steps, H] each
    ranks = [run.plan.rank for run in runs if run.plan.rank is not None]
    return Result(
        source=source,
        method=method,
        budget=budget,
        device_bytes=mean([run.plan.device_bytes for run in runs]),
        dense_bytes=dense_bytes,
        rank=mean(list(map(float, ranks))) if ranks else None,
        top_k=mean([run.plan.top_k for run in runs]),
        rows=mean([mean(run.rows) for run in runs]),
        error=mean([float(error.mean()) for error in errors]),
        worst_head=max(float(error.mean(0).max()) for error in errors),
        recall=mean([mean(run.recalls) for run in runs]),
        mass=mean([mean(run.masses) for run in runs]),
        miss_rate=mean([run.missed / max(run.looked_up, 1) for run in runs]),
        error_by_step=torch.stack([error.mean(1) for error in errors]).mean(0).tolist(),
    )
