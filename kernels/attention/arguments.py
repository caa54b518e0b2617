"""What the attention kernel takes, grouped: pointers with their strides and what finds a block.

Fields are tensors and ints where a kernel is launched, pointers and scalars within it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Vectors(NamedTuple):
    """(num_tokens, heads, D), elements contiguous."""

    start: Any
    token_stride: Any
    head_stride: Any


class Pages(NamedTuple):
    """(num_blocks, num_kv_heads, BLOCK_SIZE, token_bytes) uint8, and (num_reqs, max_blocks)."""

    start: Any
    block_stride: Any
    head_stride: Any
    table: Any
    table_stride: Any


class Ring(NamedTuple):
    """(num_blocks, num_kv_heads, SLOTS_PER_BLOCK, slot elements), and (num_reqs, m) blocks.

    ``tags`` is the same memory as int32.
    """

    start: Any
    block_stride: Any
    head_stride: Any
    slot_stride: Any
    tags: Any
    tag_block_stride: Any
    tag_head_stride: Any
    tag_slot_stride: Any
    table: Any
    table_stride: Any


def ring_arguments(window: torch.Tensor, table: torch.Tensor) -> Ring:
    """Of the tensors of the reference's ``sparse_attention``."""
    tags = window.view(torch.int32)
    return Ring(window, *window.stride()[:3], tags, *tags.stride()[:3], table, table.stride(0))


class Partial(NamedTuple):
    """Of every split: (splits, num_tokens, num_heads, D) means and their log-sum-exps, float32."""

    means: Any
    lse: Any


class Rows(NamedTuple):
    """The queries of a program, (ROWS,) each, and which of them there are.

    Attributes:
        token: int64, in the batch.
        local: int32, in the request's step.
        head: int32, of all query heads.
        real: bool; the others are loaded as zeros and not stored.
    """

    token: Any
    local: Any
    head: Any
    real: Any


class Oldest(NamedTuple):
    """First positions that a sliding window lets a program's queries see; may be negative.

    Attributes:
        of_any: the first that any of them sees.
        of_all: the first that all of them see.
        of_rows: (ROWS,), each one's own.
    """

    of_any: Any
    of_all: Any
    of_rows: Any


@triton.jit
def vectors_at(vectors, rows, element, D: tl.constexpr):
    """Pointers to the rows' vectors (ROWS, n), and a mask, for elements (n,)."""
    place = rows.token[:, None] * vectors.token_stride + rows.head[:, None] * vectors.head_stride
    mask = rows.real[:, None] & (element < D)[None, :]
    return vectors.start + place + element[None, :], mask


@triton.jit
def pages_of(pages, request, head):
    """The pages of one head, and the table of one request."""
    return Pages(
        pages.start + head * pages.head_stride,
        pages.block_stride,
        pages.head_stride,
        pages.table + request * pages.table_stride,
        pages.table_stride,
    )


@triton.jit
def ring_of(ring, request, head, D: tl.constexpr):
    """The slots of one head, their tags behind keys and values, and the table of one request."""
    WORDS: tl.constexpr = 2 * D * ring.start.dtype.element_ty.primitive_bitwidth // 32
    return Ring(
        ring.start + head * ring.head_stride,
        ring.block_stride,
        ring.head_stride,
        ring.slot_stride,
        ring.tags + head * ring.tag_head_stride + WORDS,
        ring.tag_block_stride,
        ring.tag_head_stride,
        ring.tag_slot_stride,
        ring.table + request * ring.table_stride,
        ring.table_stride,
    )
