"""LRQK as published: factorisation of a whole prompt, decode update, selection, hits and misses.

Li et al., NeurIPS 2025, arXiv 2510.23649; start, order of the updates and tie rules follow the authors' code.
Everything is per query head, float32, after RoPE. Shapes: l tokens, d head size, r rank, w working set rows,
k selected; leading dimensions (...) such as requests and heads are carried along.
"""

from dataclasses import dataclass

import torch

STARTS = ("randn", "top", "topcol")


@dataclass
class PromptFactors:
    """Low-rank factors Q ~ A_Q B_Q, K ~ A_K B_K of one prompt, float32."""

    a_q: torch.Tensor
    """[..., l, r]"""
    b_q: torch.Tensor
    """[..., r, d]"""
    a_k: torch.Tensor
    """[..., l, r]"""
    b_k: torch.Tensor
    """[..., r, d]"""


@dataclass
class DecodeUpdate:
    """What one decode token changes, float32."""

    b_q: torch.Tensor
    """[..., r, d]"""
    b_k: torch.Tensor
    """[..., r, d]"""
    q_hat: torch.Tensor
    """[..., 1, r], the token's query in factor space."""
    k_hat: torch.Tensor
    """[..., 1, r], the token's row of A_K."""


def start_factors(
    query: torch.Tensor, key: torch.Tensor, rank: int, start: str, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """First A_Q and A_K.

    "randn": standard normal. "top": the columns of Q (of K) with the largest sum of magnitudes.
    "topcol": the columns with the largest sum over both, the same for Q and K.

    Args:
        query, key: float32 [..., l, d].

    Returns:
        A_Q, A_K: float32 [..., l, r].

    Raises:
        ValueError: `start` is not one of STARTS.
    """
    if start == "randn":
        shape = (*query.shape[:-1], rank)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    query_size, key_size = query.abs().sum(-2, keepdim=True), key.abs().sum(-2, keepdim=True)  # [..., 1, d]
    if start == "topcol":
        query_size = key_size = query_size + key_size
    elif start != "top":
        raise ValueError(f"start is {start!r}, but must be one of {', '.join(STARTS)}.")

    def largest(matrix: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        columns = size.topk(rank, dim=-1).indices
        return matrix.gather(-1, columns.expand(*matrix.shape[:-1], rank))

    return largest(query, query_size), largest(key, key_size)


def factorize_prompt(
    query: torch.Tensor,
    key: torch.Tensor,
    a_q: torch.Tensor,
    a_k: torch.Tensor,
    iterations: int = 2,
    tolerance: float = 1e-2,
    lambda_q: float = 1.0,
    lambda_k: float = 1.0,
) -> PromptFactors:
    """Alternating minimisation of the prefill objective (section 3 of the paper).

        1/2 |Q K' - A_Q A_K'|^2 + lambda_q/2 |Q - A_Q B_Q|^2 + lambda_k/2 |K - A_K B_K|^2

    Ends early when the mean squared change of both A_Q and A_K, over all leading dimensions, is below `tolerance`.
    With lambda_q = lambda_k = 1 the update of A_K uses the new A_Q; otherwise the authors' code uses the old one.

    Args:
        query, key: float32 [..., l, d].
        a_q, a_k: float32 [..., l, r], see `start_factors`.
    """
    for _ in range(iterations):
        b_q, b_k = _reconstruction(a_q, query), _reconstruction(a_k, key)
        new_a_q = query @ _divide(key.mT @ a_k + lambda_q * b_q.mT, a_k.mT @ a_k + lambda_q * b_q @ b_q.mT)
        seen = new_a_q if lambda_q == lambda_k == 1.0 else a_q
        new_a_k = key @ _divide(query.mT @ seen + lambda_k * b_k.mT, seen.mT @ seen + lambda_k * b_k @ b_k.mT)
        change = max((new_a_q - a_q).square().mean(), (new_a_k - a_k).square().mean())
        a_q, a_k = new_a_q, new_a_k
        if change < tolerance:
            break
    return PromptFactors(a_q, _reconstruction(a_q, query), a_k, _reconstruction(a_k, key))


def decode_update(
    b_q: torch.Tensor,
    b_k: torch.Tensor,
    working_a_k: torch.Tensor,
    working_key: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    iterations: int = 2,
    tolerance: float = 1e-2,
    lambda_token: float = 1.0,
    lambda_working: float = 1.0,
) -> DecodeUpdate:
    """Factors of one new token, and the update of B_Q and B_K (section 3 of the paper).

    Args:
        b_q, b_k: float32 [..., r, d].
        working_a_k, working_key: float32 [..., w, r] and [..., w, d], factors and keys that the last step attended to.
        query, key: float32 [..., 1, d], the new token's.
        lambda_token: weight of the new token's own score, |q k' - q^ k^'|^2.
        lambda_working: weight of the scores of the working set, |q K_W' - q^ A_W'|^2.
    """
    key_side, key_gram = key @ b_k.mT, b_k @ b_k.mT
    query_side = query @ b_q.mT + lambda_working * (query @ working_key.mT) @ working_a_k
    query_gram = b_q @ b_q.mT + lambda_working * working_a_k.mT @ working_a_k
    own_score = lambda_token * query @ key.mT  # [..., 1, 1]
    k_hat = _divide(key_side, key_gram)
    for _ in range(max(iterations, 1)):
        q_hat = _divide(query_side + own_score * k_hat, query_gram + lambda_token * k_hat.mT @ k_hat)
        new_k_hat = _divide(key_side + own_score * q_hat, key_gram + lambda_token * q_hat.mT @ q_hat)
        change = (new_k_hat - k_hat).square().mean()
        k_hat = new_k_hat
        if change < tolerance:
            break
    return DecodeUpdate(_descend(b_q, q_hat, query), _descend(b_k, k_hat, key), q_hat, k_hat)


def select_rows(q_hat: torch.Tensor, a_k: torch.Tensor, top_k: int) -> torch.Tensor:
    """The top_k tokens by q^ A_K', ascending; all where there are no more than top_k.

    Args:
        q_hat: float32 [..., 1, r].
        a_k: float32 [..., c, r], factors of the candidates.

    Returns:
        int64 [..., min(top_k, c)].
    """
    scores = (a_k @ q_hat.mT)[..., 0]  # [..., c]
    return scores.topk(min(top_k, scores.shape[-1])).indices.sort().values


def replace_missed(resident: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the wanted tokens that are not resident into the places of resident tokens that are not wanted.

    Hits keep their place; the missed tokens fill the free places in ascending order of both.

    Args:
        resident, wanted: int64 [..., k], each without duplicates; `wanted` ascending.

    Returns:
        The new residents, int64 [..., k], and a bool mask [..., k] of the places that a miss filled.
    """
    same = resident[..., :, None] == wanted[..., None, :]
    is_miss, is_missed = ~same.any(-1), ~same.any(-2)
    updated = resident.clone()
    updated[is_miss] = wanted[is_missed]
    return updated, is_miss


def _divide(numerator: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """numerator @ gram^-1."""
    return torch.linalg.solve(gram, numerator, left=False)


def _reconstruction(a: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """B = (A'A)^-1 A' M, float32 [..., r, d]."""
    return torch.linalg.solve(a.mT @ a, a.mT @ matrix)


def _descend(b: torch.Tensor, row: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """B after one gradient step on |row B - target|^2 with the step length that minimises it."""
    gradient = row.mT @ (row @ b - target)
    epsilon = 1e-6  # as in the authors' code
    step = gradient.square().sum((-2, -1), keepdim=True) / (
        (row @ gradient).square().sum((-2, -1), keepdim=True) + epsilon
    )
    return b - step * gradient
