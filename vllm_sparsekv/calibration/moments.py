"""Second moments of what attention stores and of what reads it, of one layer.

Keys count by the attention they receive, p (1 - p) summed over queries, the derivative of the
softmax. An error e in a value moves the layer's output by ``p Wo e``: values count by p squared,
summed over queries, and are read by the rows of the output projection Wo, each head's as much as
its own p squared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class Moments:
    """Sums over all tokens seen, float64 on the CPU; sums of two halves are those of the whole.

    Attributes:
        key: (num_kv_heads, D, D), k k^t over keys, weighted.
        key_sum: (num_kv_heads, D), k, weighted alike.
        key_weight: (num_kv_heads,), the weights.
        query: (num_kv_heads, D, D), q q^t over the queries of the group.
        value: (num_kv_heads, D, D), v v^t over values, weighted.
        value_sum: (num_kv_heads, D), v, weighted alike.
        value_weight: (num_kv_heads,), the weights.
        output: (num_kv_heads, D, D), Wo^t Wo over the heads of the group, weighted.
    """

    key: torch.Tensor
    key_sum: torch.Tensor
    key_weight: torch.Tensor
    query: torch.Tensor
    value: torch.Tensor
    value_sum: torch.Tensor
    value_weight: torch.Tensor
    output: torch.Tensor

    @classmethod
    def zeros(cls, num_kv_heads: int, head_size: int) -> Moments:
        shapes = {"key_sum": 1, "value_sum": 1, "key_weight": 0, "value_weight": 0}
        return cls(
            *(
                torch.zeros(
                    num_kv_heads, *[head_size] * shapes.get(field.name, 2), dtype=torch.float64
                )
                for field in fields(cls)
            )
        )

    def observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        reading: torch.Tensor | None,
        scale: float,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Add the causal attention of one whole sequence.

        Args:
            query: (tokens, num_heads, D) after RoPE.
            key: (tokens, num_kv_heads, D) after RoPE.
            value: (tokens, num_kv_heads, D).
            reading: of :func:`head_grams`; None where Wo is not known, and values are taken as
                read alike in all directions.
            scale, sliding_window, soft_cap, sinks: as in ``kernels/attention/reference.py``.
        """
        tokens, num_kv_heads, head_size = key.shape
        query = query.float().transpose(0, 1).unflatten(0, (num_kv_heads, -1))
        key, value = (x.float().transpose(0, 1) for x in (key, value))
        group = query.shape[1]
        position = torch.arange(tokens, device=key.device)
        distance = position[:, None] - position
        hidden = distance < 0
        if sliding_window is not None:
            hidden |= distance >= sliding_window
        if reading is None:
            reading = torch.eye(head_size, dtype=torch.float64).expand(len(query) * group, -1, -1)
        reading = reading.unflatten(0, (num_kv_heads, group))
        for head in range(num_kv_heads):
            scores = query[head] @ key[head].mT * scale
            slope = None
            if soft_cap is not None:
                scores = soft_cap * (scores / soft_cap).tanh()
                slope = 1 - (scores / soft_cap).square()
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                sink = sinks.float().view(num_kv_heads, group)[head, :, None, None]
                scores = torch.cat([scores, sink.expand(group, tokens, 1)], -1)
            p = scores.softmax(-1)[..., :tokens]
            squared = p.square()
            received = p - squared if slope is None else (p - squared) * slope.square()
            key_weight, value_weight = (x.sum((0, 1)).double() for x in (received, squared))
            queries, keys, values = (x[head].double() for x in (query, key, value))
            weighted_keys, weighted_values = (
                keys * key_weight[:, None],
                values * value_weight[:, None],
            )
            queries = queries.flatten(0, 1)
            shares = squared.sum((1, 2)).double().cpu()
            added = {
                "key": keys.mT @ weighted_keys,
                "key_sum": weighted_keys.sum(0),
                "key_weight": key_weight.sum(),
                "query": queries.mT @ queries,
                "value": values.mT @ weighted_values,
                "value_sum": weighted_values.sum(0),
                "value_weight": value_weight.sum(),
                "output": (reading[head] * shares[:, None, None]).sum(0),
            }
            for name, amount in added.items():
                getattr(self, name)[head] += amount.cpu()

    def add(self, other: Moments, heads: slice) -> None:
        """Add what was seen of some of the KV heads elsewhere."""
        for field in fields(self):
            getattr(self, field.name)[heads] += getattr(other, field.name)


def head_grams(projection: torch.Tensor, head_size: int) -> torch.Tensor:
    """Wo^t Wo of each head, (num_heads, D, D) float64 on the CPU.

    Args:
        projection: Wo, (hidden size, num_heads * D).
        head_size: D.
    """
    heads = projection.double().unflatten(1, (-1, head_size)).transpose(0, 1)
    return (heads.mT @ heads).cpu()
