"""Tokens that leave the cache: heavy hitters stay (H2O, arXiv 2306.14048), for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeavyHitters:
    """The newest tokens, and of the older ones those that got most attention while they were there.

    Decoding token by token: after each step in which there are more, the older token with the least
    attention so far, summed over the queries of a KV head, leaves that head's cache for good.

    Attributes:
        recent: share of a text's tokens that is always there.
        heavy: share that is there for the attention it got.
    """

    recent: float
    heavy: float

    @property
    def share(self) -> float:
        return self.recent + self.heavy

    def gone(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """What each step no longer finds.

        Args:
            query: (num_heads, tokens, D) float32.
            key: (num_kv_heads, tokens, D) float32, as the cache returns them.
            scale: factor on q . k.

        Returns:
            (num_kv_heads, tokens, tokens) bool, by query and key.
        """
        num_kv_heads, tokens, _ = key.shape
        recent, budget = (max(1, round(tokens * share)) for share in (self.recent, self.share))
        grouped = query.unflatten(0, (num_kv_heads, -1)) * scale
        left = torch.zeros(num_kv_heads, tokens, dtype=torch.bool)
        received = torch.zeros(num_kv_heads, tokens)
        gone = torch.zeros(num_kv_heads, tokens, tokens, dtype=torch.bool)
        for step in range(tokens):
            there = slice(0, step + 1)
            gone[:, step, there] = left[:, there]
            scores = (grouped[:, :, step, None] @ key[:, None, there].mT).squeeze(2)
            scores.masked_fill_(left[:, None, there], -torch.inf)
            received[:, there] += scores.softmax(-1).sum(1)
            if step + 1 > budget:
                old = slice(0, step + 1 - recent)
                least = received[:, old].masked_fill(left[:, old], torch.inf).argmin(-1)
                left.scatter_(1, least[:, None], True)
        return gone
