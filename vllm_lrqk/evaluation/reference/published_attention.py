"""Attention of one layer with LRQK as published: selection and working set per query head, one request."""

from dataclasses import dataclass

import torch

from vllm_lrqk.evaluation.reference.published import (
    decode_update,
    factorize_prompt,
    replace_missed,
    select_rows,
    start_factors,
)


@dataclass(frozen=True)
class PublishedSettings:
    """Settings of the published method; the defaults are those of the paper's short-context experiments."""

    rank: int = 32
    top_k: int = 512
    recent_tokens: int = 64
    start: str = "topcol"
    iterations: int = 2
    tolerance: float = 1e-2


class PublishedAttention:
    """State of one layer: factors, the residents of the working set, keys and values.

    Keys and values of a KV head are repeated for its query heads, as in the authors' code; no memory is offloaded.

    Args:
        query: [H, l, d], the prompt's queries.
        key, value: [KV, l, d]; l is at least settings.top_k.
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: PublishedSettings
    ) -> None:
        self.settings = settings
        self.group = query.shape[0] // key.shape[0]
        self.key, self.value = self._repeat(key), self._repeat(value)  # float32 [H, l, d]
        query = query.float()
        if self.num_tokens < settings.top_k:
            raise ValueError(f"the prompt has {self.num_tokens} tokens, but needs top_k = {settings.top_k} or more")
        a_q, a_k = start_factors(query, self.key, settings.rank, settings.start)
        factors = factorize_prompt(query, self.key, a_q, a_k, settings.iterations, settings.tolerance)
        self.b_q, self.b_k, self.a_k = factors.b_q, factors.b_k, factors.a_k
        self.resident = torch.arange(settings.top_k).expand(query.shape[0], -1)  # int64 [H, k]
        if self.num_tokens > settings.top_k + settings.recent_tokens:
            candidates = self.a_k[:, : self.num_tokens - settings.recent_tokens]
            self.resident = select_rows(factors.a_q[:, -1:], candidates, settings.top_k)
        self.misses = 0
        """Rows that the latest step fetched, summed over query heads."""

    @property
    def num_tokens(self) -> int:
        return self.key.shape[1]

    def decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Append one token and attend.

        Args:
            query: [H, d].
            key, value: [KV, d].

        Returns:
            float32 [H, d].
        """
        settings, old_tokens = self.settings, self.num_tokens
        query = query.float()[:, None]
        key, value = self._repeat(key[:, None]), self._repeat(value[:, None])
        # The new token has replaced the oldest recent one before the update.
        working = self.attended_rows(old_tokens + 1)[:, :-1]
        update = decode_update(
            self.b_q,
            self.b_k,
            _take(self.a_k, working),
            _take(self.key, working),
            query,
            key,
            settings.iterations,
            settings.tolerance,
        )
        self.b_q, self.b_k = update.b_q, update.b_k
        self.a_k = torch.cat([self.a_k, update.k_hat], 1)
        self.key, self.value = torch.cat([self.key, key], 1), torch.cat([self.value, value], 1)
        self.misses = 0
        if self.num_tokens > settings.top_k + settings.recent_tokens:
            # The authors' code leaves out one more token than the recent ones.
            candidates = self.a_k[:, : self.num_tokens - settings.recent_tokens - 1]
            wanted = select_rows(update.q_hat, candidates, settings.top_k)
            self.resident, is_miss = replace_missed(self.resident, wanted)
            self.misses = int(is_miss.sum())
        attended = self.attended_rows(self.num_tokens)
        scores = query @ _take(self.key, attended).mT * query.shape[-1] ** -0.5
        return (scores.softmax(-1) @ _take(self.value, attended))[:, 0]

    def device_bytes(self, itemsize: int = 2) -> int:
        """Bytes the published method keeps on the GPU: A_K, B_Q, B_K, and key and value rows of the working set.

        Args:
            itemsize: bytes per element; the authors' code stores all of these in the model's 16-bit type.
        """
        rows = self.settings.top_k + self.settings.recent_tokens
        working = 2 * self.key.shape[0] * rows * self.key.shape[-1]
        return itemsize * (self.a_k.numel() + self.b_q.numel() + self.b_k.numel() + working)

    def attended_rows(self, num_tokens: int) -> torch.Tensor:
        """int64 [H, min(num_tokens, k + recent)]: residents, then the recent tokens of `num_tokens`."""
        first_recent = max(self.settings.top_k, num_tokens - self.settings.recent_tokens)
        recent = torch.arange(first_recent, num_tokens).expand(self.resident.shape[0], -1)
        return torch.cat([self.resident, recent], 1)

    def _repeat(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.float().repeat_interleave(self.group, 0)


def _take(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [H, n] of [H, l, c]."""
    return matrix.gather(1, rows[..., None].expand(-1, -1, matrix.shape[-1]))
