"""Second moments of a model's keys, queries and values, observed in transformers' attention.

Keys count by the attention they receive, p (1 - p) summed over queries, the derivative of the
softmax. An error e in a value moves the layer's output by ``p Wo e``: values count by p squared,
summed over queries, and are read by the rows of the output projection Wo, each head's as much as
its own p squared.

Rotary embedding turns keys and queries with their position, the slowest planes by little within
one sample. Attention knows only distances, so samples are placed all over the context: the moments
are then those of keys at any position.
"""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_sparsekv.calibration.balance import balanced_basis
from vllm_sparsekv.format.basis import LayerMatrices

NAME = "sparsekv_calibration"

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense")
"""What transformers' attention layers call the linear layer after attention."""


class Moments:
    """Second moments of what is stored and of what reads it, by attention layer.

    Attributes:
        key: (num_kv_heads, D, D) float64, sum of k k^t over keys, weighted.
        query: (num_kv_heads, D, D) float64, sum of q q^t over the queries of the group.
        value: (num_kv_heads, D, D) float64, sum of v v^t over values, weighted.
        output: (num_kv_heads, D, D) float64, sum of Wo^t Wo over the heads of the group, weighted.
    """

    def __init__(self) -> None:
        self.key: dict[int, torch.Tensor] = {}
        self.query: dict[int, torch.Tensor] = {}
        self.value: dict[int, torch.Tensor] = {}
        self.output: dict[int, torch.Tensor] = {}

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Causal attention of one unpadded text under transformers' interface, observed.

        Args:
            module: the attention layer; its ``layer_idx`` names the moments.
            query: (1, num_heads, tokens, D) after RoPE.
            key: (1, num_kv_heads, tokens, D) after RoPE.
            value: (1, num_kv_heads, tokens, D).
            scaling: factor on q . k.

        Returns:
            (1, tokens, num_heads, D) in the dtype of query, and no weights.

        Raises:
            ValueError: the layer has no output projection under a known name.
        """
        num_kv_heads, tokens = key.shape[1:3]
        grouped = query[0].unflatten(0, (num_kv_heads, -1))
        projection = _output_projection(module).unflatten(1, (*grouped.shape[:2], -1))
        future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        out, key_weight, value_weight, head_weight = [], [], [], []
        for q, k, v in zip(grouped, key[0], value[0], strict=True):
            scores = (q @ k.mT).float() * scaling
            p = scores.masked_fill(future, -torch.inf).softmax(-1)
            squared = p.square()
            key_weight.append((p - squared).sum((0, 1)))
            value_weight.append(squared.sum((0, 1)))
            head_weight.append(squared.sum((1, 2)))
            out.append(p.to(v.dtype) @ v)
        read = projection.permute(1, 2, 0, 3)
        rows = torch.stack(head_weight).unsqueeze(-1).expand(read.shape[:3])
        layer = module.layer_idx
        _add(self.key, layer, key[0], torch.stack(key_weight))
        _add(self.query, layer, grouped.flatten(1, 2))
        _add(self.value, layer, value[0], torch.stack(value_weight))
        _add(self.output, layer, read.flatten(1, 2), rows.flatten(1, 2))
        return torch.cat(out).transpose(0, 1).unsqueeze(0).contiguous(), None


def _output_projection(module: torch.nn.Module) -> torch.Tensor:
    """Weight (hidden size, num_heads * D) of the linear layer after attention."""
    for name in OUTPUT_PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if weight is not None:
            return weight
    raise ValueError(
        f"{type(module).__name__}: has no output projection, must be one of {OUTPUT_PROJECTIONS}"
    )


def _add(
    moments: dict[int, torch.Tensor],
    layer: int,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> None:
    """Add the moment of x, (num_kv_heads, n, D), weighted by (num_kv_heads, n)."""
    x = x.double()
    weighted = x if weight is None else x * weight.double().unsqueeze(-1)
    moments[layer] = moments.get(layer, 0) + (x.mT @ weighted).cpu()


@torch.inference_mode()
def calibrate(model: PreTrainedModel, samples: torch.Tensor, context: int) -> list[LayerMatrices]:
    """Bases of all layers of a model.

    Args:
        model: a decoder whose attention implementation can be chosen.
        samples: (count, tokens) int64, run one by one.
        context: positions to calibrate for; samples are spread over them, at least ``tokens``.

    Returns:
        by layer, float64, see :func:`balanced_basis`.

    Raises:
        ValueError: an attention layer whose output projection is not found.
    """
    moments = Moments()
    ALL_ATTENTION_FUNCTIONS.register(NAME, moments.attention)
    model.set_attn_implementation(NAME)
    for index, tokens in enumerate(samples, 1):
        # Multiples of the golden ratio, modulo 1, fill the unit interval evenly.
        first = round((context - len(tokens)) * (index * (5**0.5 - 1) / 2 % 1))
        positions = torch.arange(first, first + len(tokens), device=model.device)
        model.base_model(
            tokens.unsqueeze(0).to(model.device),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
        )
        print(f"sample {index}/{len(samples)}", file=sys.stderr, flush=True)
    return [
        LayerMatrices(
            key=balanced_basis(moments.key[layer], moments.query[layer]),
            value=balanced_basis(moments.value[layer], moments.output[layer]),
        )
        for layer in sorted(moments.key)
    ]
