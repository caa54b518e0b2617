"""Which elements of cached vectors survive: the policies of the literature, for comparison.

A policy sees the keys, or values, of a whole text at once. Serving must decide vector by vector, as
tokens come: there :class:`Magnitude` is the policy, in the model's own basis or in a calibrated
one, in which an element matters to scores as much as it is large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

WINDOW = 32
"""Tokens: the dense window of Mustafar and ThinK, the last queries that ThinK looks at, and a group
that is pruned channel by channel."""


class Policy(Protocol):
    def survivors(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        """What is kept.

        Args:
            x: (num_kv_heads, tokens, D), keys or values.
            query: (num_heads, tokens, D), the queries of the text; None with values.

        Returns:
            (num_kv_heads, tokens, D) bool.
        """


@dataclass(frozen=True)
class Magnitude:
    """The largest of each vector (Mustafar, arXiv 2505.22913, per-token magnitude)."""

    kept: int

    def survivors(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        return _largest(x.abs(), self.kept, -1)


@dataclass(frozen=True)
class TwoOfFour:
    """The two largest of each four neighbours in a vector, which sparse tensor cores can multiply
    (HieraSparse, arXiv 2604.16864, with every vector pruned)."""

    def survivors(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        return _largest(x.abs().unflatten(-1, (-1, 4)), 2, -1).flatten(-2)


@dataclass(frozen=True)
class OutputAware:
    """The largest of each key times its channel's weight, the mean size of all queries there.

    Mustafar's output-aware score, with the weight of the text instead of the last queries'.
    """

    kept: int

    def survivors(self, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        weight = query.float().abs().unflatten(0, (len(x), -1)).mean((1, 2))
        return _largest(x.float().abs() * weight.unsqueeze(1), self.kept, -1)


@dataclass(frozen=True)
class PerChannel:
    """The largest of each channel in every group of :data:`WINDOW` tokens, a share of them."""

    share: float

    def survivors(self, x: torch.Tensor, query: torch.Tensor | None) -> torch.Tensor:
        groups = x.abs().split(WINDOW, 1)
        return torch.cat([_largest(g, round(g.shape[1] * self.share), 1) for g in groups], 1)


@dataclass(frozen=True)
class Think:
    """Whole key channels by query-driven score, per head (ThinK, arXiv 2407.21018).

    The score of a channel is the product of its norms in the last :data:`WINDOW` queries and in
    the keys.
    """

    kept: int

    def survivors(self, x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        observed = query[:, -WINDOW:].float().unflatten(0, (len(x), -1))
        score = observed.square().sum((1, 2)).sqrt() * x.float().square().sum(1).sqrt()
        return _largest(score, self.kept, -1).unsqueeze(1).expand_as(x)


def _largest(x: torch.Tensor, kept: int, axis: int) -> torch.Tensor:
    """The ``kept`` largest along an axis, as bool."""
    return torch.zeros_like(x, dtype=torch.bool).scatter_(axis, x.topk(kept, axis).indices, True)
