"""Whether two selections are the same up to the error of the scores."""

import torch
from cpu_kernel_cases import Layer

from vllm_lrqk.select import Selection, candidate_range, proxy_scores


def assert_selects_like(actual: Selection, expected: Selection, layer: Layer, score_error: float) -> None:
    """`actual` against the torch form's, on CPU tensors; rows may differ where weights are closer than the error."""
    config, n = layer.config, layer.config.page_size
    assert (actual.residual is None) == (config.residual == "none")
    first, ends = candidate_range(layer.seq_lens, config)
    kv_heads, group = layer.host.shape[1], layer.query.shape[1] // layer.host.shape[1]
    for b, end in enumerate(ends.tolist()):
        for h in range(kv_heads):
            rows, truth = (sorted(x.rows[b, h][x.rows[b, h] >= 0].tolist()) for x in (actual, expected))
            assert len(rows) == len(set(rows)) == len(truth)
            if rows != truth:
                table = layer.block_table[b : b + 1, : -(-end // n)]
                scores = proxy_scores(layer.query[b : b + 1], layer.factors, table, layer.scale).flatten(2)[0]
                weight = scores[:, first:end].double().softmax(-1).unflatten(0, (kv_heads, -1))[h].sum(0)
                threshold = weight.topk(config.top_k).values[-1]
                only = torch.tensor(sorted(set(rows) ^ set(truth))) - first
                assert ((weight[only] / threshold).log().abs() < 2 * score_error).all()
            elif actual.residual is not None:
                heads = slice(h * group, (h + 1) * group)
                _assert_close(actual.residual[b, heads], expected.residual, b, heads, score_error)


def _assert_close(left: torch.Tensor, expected: torch.Tensor | None, b: int, heads: slice, score_error: float) -> None:
    right = torch.full_like(left, -torch.inf)
    if expected is not None:
        right[:, : expected.shape[-1]] = expected[b, heads]
    assert torch.equal(left.isinf(), right.isinf())
    finite = ~right.isinf()
    assert ((left - right)[finite].abs() < score_error).all()
