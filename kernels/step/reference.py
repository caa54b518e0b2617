"""One layer's step: vectors change basis and are packed, the step attends, the window is filled.

The definition is a composition of the other operations; a fused kernel gives the same but for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from vllm_sparsekv.format.basis import Basis
from vllm_sparsekv.format.layout import SparseFormat


@dataclass(eq=False)
class Layer:
    """What attention of one layer needs in every step.

    Attributes:
        format: of its pages and its window.
        basis: in which they hold vectors.
        scale, sliding_window, soft_cap, sinks: as in ``attention/reference.py``.
        state: what an implementation keeps from step to step.
        checked: the form of arguments that were found right.
    """

    format: SparseFormat
    basis: Basis
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    state: Any = field(default=None, repr=False)
    checked: tuple = field(default=(), repr=False)


@dataclass(eq=False)
class Batch:
    """One step of the requests that share a block table, for all layers that do.

    Attributes:
        query_start_loc: (num_reqs + 1,) int32, first token of each request in this step.
        seq_lens: (num_reqs,) int32, tokens of each request including this step's.
        block_table: (num_reqs, max_blocks) int32, page of each block of tokens.
        slot_mapping: (num_slots,) int64, where each token's vectors go; negative for nowhere.
        window_block_table: (num_reqs, m) int32, ring blocks of each request, or None.
        state: what an implementation keeps from layer to layer.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    window_block_table: torch.Tensor | None
    state: Any = field(default=None, repr=False)

    @cached_property
    def form(self) -> tuple:
        """Shapes, dtypes and devices."""
        tensors = (self.query_start_loc, self.seq_lens, self.block_table, self.slot_mapping)
        return form_of(*tensors, self.window_block_table)


def form_of(*tensors: torch.Tensor | None) -> tuple:
    """Shape, dtype and device of each."""
    return tuple(x if x is None else (x.shape, x.dtype, x.device) for x in tensors)


class Operations(NamedTuple):
    """What a step is composed of; signatures are those of each ``reference.py``."""

    pack: Callable[..., None]
    sparse_attention: Callable[..., None]
    write_window: Callable[..., None]


def step(
    operations: Operations,
    layer: Layer,
    batch: Batch,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    fills_window: bool = True,
    **options: Any,
) -> None:
    """Store the step's keys and values, and write its attention into ``out``.

    Args:
        operations: what it is composed of.
        layer: the layer.
        batch: the step.
        query: (num_tokens, num_heads, D) model dtype, after RoPE.
        key: (num_tokens, num_kv_heads, D) model dtype, after RoPE; None in a layer that reads
            what another one has kept.
        value: (num_tokens, num_kv_heads, D) model dtype, or None likewise.
        pages: (num_blocks, num_kv_heads, block_size, token_bytes) uint8.
        window: (num_blocks, num_kv_heads, r, slot elements) model dtype, or None when the format's
            window is 0.
        out: (num_tokens, num_heads, D), written for the tokens of the requests only.
        kept: two of (num_tokens, num_kv_heads, D) model dtype, the step's keys and values in the
            basis: written where ``key`` is given, read where not.
        fills_window: whether the layer is the last one in this step to read the window.
        options: for ``operations.sparse_attention``.
    """
    fmt, basis = layer.format, layer.basis
    if key is None:
        assert kept is not None
        key, value = kept
    else:
        key, value = basis.stored_key(key), basis.stored_value(value)
        operations.pack(
            key,
            value,
            batch.slot_mapping,
            pages,
            fmt,
            key_feedback=basis.key_feedback,
            value_feedback=basis.value_feedback,
        )
        if kept is not None:
            kept[0].copy_(key)
            kept[1].copy_(value)
    stored = torch.empty_like(out) if basis.output is not None else out
    operations.sparse_attention(
        basis.asked(query),
        key,
        value,
        pages,
        window,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.window_block_table,
        layer.scale,
        fmt,
        stored,
        sliding_window=layer.sliding_window,
        soft_cap=layer.soft_cap,
        sinks=layer.sinks,
        **options,
    )
    if stored is not out:
        out.copy_(basis.restored(stored))
    if window is not None and fills_window:
        operations.write_window(
            key,
            value,
            window,
            batch.query_start_loc,
            batch.seq_lens,
            batch.slot_mapping,
            batch.window_block_table,
            fmt,
        )
