"""The change of basis of vectors in Triton (:mod:`vllm_sparsekv.format.basis`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

PART = tl.constexpr(4096)
"""Elements of a matrix that are multiplied at once, so that they fit registers."""


class Change(NamedTuple):
    """What vectors of a KV head are multiplied with.

    Attributes:
        matrix: (D, D), or (num_kv_heads, D, D).
        head_stride: elements from head to head, 0 where all share one.
        mean: (num_kv_heads, D), taken off before or added after, or None.
    """

    matrix: Any
    head_stride: Any
    mean: Any


@triton.jit
def change_rows(
    source, real, change, head, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr
):
    """``(x - mean) @ matrix`` of vectors in memory: (ROWS, n) float32, zeros beyond SIZE.

    Args:
        source: (ROWS,) pointers to vectors of D elements.
        real: (ROWS,) bool; of the others nothing is read.
        change: :class:`Change`.
        head: KV head.
        FIRST: first column of the matrix.
        SIZE: columns.
    """
    PADDED: tl.constexpr = triton.next_power_of_2(SIZE)
    CHUNK: tl.constexpr = min(triton.next_power_of_2(D), max(16, PART // PADDED))
    total = tl.zeros([source.shape[0], PADDED], tl.float32)
    matrix = change.matrix + head * change.head_stride + FIRST
    for start in range(0, D, CHUNK):
        element = start + tl.arange(0, CHUNK)
        mask = real[:, None] & (element < D)[None, :]
        x = tl.load(source[:, None] + element[None, :], mask=mask, other=0)
        if change.mean is not None:
            mean = tl.load(change.mean + head * D + element, mask=element < D, other=0)
            x = (x.to(tl.float32) - mean.to(tl.float32)[None, :]).to(x.dtype)
        total = _multiply(x, matrix + start * D, total, D - start, SIZE, D)
    return total


@triton.jit
def change_back(x, change, head, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    """Columns START to START + SIZE of ``x @ matrix + mean``: (ROWS, SIZE) float32.

    Args:
        x: (ROWS, n) model dtype, zeros beyond D.
        change, head: as of :func:`change_rows`.
        SIZE: a power of two; those beyond D hold junk.
    """
    total = tl.zeros([x.shape[0], SIZE], tl.float32)
    matrix = change.matrix + head * change.head_stride + START
    total = _multiply(x, matrix, total, D, D - START, D)
    if change.mean is not None:
        column = START + tl.arange(0, SIZE)
        mean = tl.load(change.mean + head * D + column, mask=column < D, other=0)
        total += mean.to(tl.float32)[None, :]
    return total


@triton.jit
def _multiply(x, matrix, total, height, WIDTH: tl.constexpr, STRIDE: tl.constexpr):
    """``total + x @ matrix``, with zeros beyond ``height`` and WIDTH of the matrix."""
    row = tl.arange(0, x.shape[1])[:, None]
    column = tl.arange(0, total.shape[1])[None, :]
    mask = (row < height) & (column < WIDTH)
    part = tl.load(matrix + row * STRIDE + column, mask=mask, other=0)
    if part.dtype != x.dtype:
        return tl.dot(x.to(tl.float32), part.to(tl.float32), total, input_precision="ieee")
    return tl.dot(x, part, total, input_precision="ieee")
