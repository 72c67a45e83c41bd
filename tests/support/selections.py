"""Whether two selections are the same up to the error of the scores."""

import torch
from cpu_kernel_cases import Layer

from vllm_lrqk.core.selection import Selection, candidate_range
from vllm_lrqk.methods.lrqk.score import proxy_scores

FLOAT32_ERROR = 2e-4
"""Of scores whose terms reach some hundreds."""
HALF = 2**-11
"""Of the CUDA kernels, relative to a score's distance from the highest of its tile, which they keep in float16."""
SUM_ERROR = 1e-5
"""Of float32 sums over a page's tokens, relative to what is summed."""


def assert_selects_like(actual: Selection, expected: Selection, layer: Layer, rounding: float = 0.0) -> None:
    """`actual` against the torch form's, on CPU tensors; rows may differ where weights are closer than the error.

    Args:
        rounding: relative error of the scores' distances.
    """
    config, n = layer.config, layer.config.page_size
    assert (actual.residual is None) == (config.residual == "none")
    assert (actual.moment is None) == (config.residual != "linear")
    first, ends = candidate_range(layer.seq_lens, config)
    kv_heads, group = layer.host.shape[1], layer.query.shape[1] // layer.host.shape[1]
    for b, end in enumerate(ends.tolist()):
        for h in range(kv_heads):
            rows, truth = (sorted(x.positions[b, h][x.positions[b, h] >= 0].tolist()) for x in (actual, expected))
            assert len(rows) == len(set(rows)) == len(truth)
            heads = slice(h * group, (h + 1) * group)
            scores = torch.zeros(group, 1)
            if end > first:
                table = layer.block_table[b : b + 1, : -(-end // n)]
                scores = proxy_scores(layer.query[b : b + 1], layer.factors, table, layer.scale).flatten(2)
                scores = scores[0, heads, first:end]
            error = FLOAT32_ERROR + rounding * float(scores.max(1).values.sub(scores.min(1).values).max())
            if rows != truth:
                weight = scores.double().softmax(-1).sum(0)
                threshold = weight.topk(config.top_k).values[-1]
                only = torch.tensor(sorted(set(rows) ^ set(truth))) - first
                assert ((weight[only] / threshold).log().abs() < 2 * error).all()
            elif actual.residual is not None:
                _assert_close(actual.residual[b, heads], expected.residual, b, heads, error)
                if actual.moment is not None:
                    _assert_factors_close(actual, expected, layer, b, h, error)


def _assert_close(left: torch.Tensor, expected: torch.Tensor | None, b: int, heads: slice, error: float) -> None:
    right = torch.full_like(left, -torch.inf)
    if expected is not None:
        right[:, : expected.shape[-1]] = expected[b, heads]
    assert torch.equal(left.isinf(), right.isinf())
    finite = ~right.isinf()
    assert ((left - right)[finite].abs() < error).all()


def _assert_factors_close(
    actual: Selection, expected: Selection, layer: Layer, b: int, kv_head: int, error: float
) -> None:
    """Scores that are off by `error` move a weighted mean by `error` times the mean distance from it, to first order.

    That distance is half the range of the column in the page at most; the whole range covers the higher orders.
    """
    assert actual.moment is not None
    assert actual.residual is not None
    group = layer.query.shape[1] // layer.host.shape[1]
    heads = slice(kv_head * group, (kv_head + 1) * group)
    left = actual.moment[b, heads]  # [G, P, columns]
    right = torch.zeros_like(left)
    if expected.moment is not None:
        right[:, : expected.moment.shape[2]] = expected.moment[b, heads]
    is_empty = actual.residual[b, heads].isinf()
    column = layer.factors.key_factor(layer.block_table[b].long())[:, kv_head, :, : left.shape[-1]].float()
    allowed = error * (column.amax(1) - column.amin(1)) + SUM_ERROR * column.abs().amax(1)
    assert ((left - right).abs() <= allowed)[~is_empty].all()
