"""Online softmax in Triton: tiles of scores, soft caps, sinks, and what a program leaves."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.arguments import vectors_at

LOG2_E = tl.constexpr(1.4426950408889634)
"""Scores are in base 2."""


class Softmax(NamedTuple):
    """Values weighted by 2 ** (score - maximum), by row: float32.

    Attributes:
        maximum: (ROWS,), -inf where nothing was seen.
        total: (ROWS,), sums of the weights.
        weighted: (ROWS, PADDED), weighted sums of the values.
    """

    maximum: Any
    total: Any
    weighted: Any


@triton.jit
def fold(sums, scores, v, step):
    """Add values v (n, PADDED) with scores (ROWS, n) to a :class:`Softmax`.

    ``step`` (n,) is what values count in, or None. Its power of two joins the scores before the
    maximum is taken, so that weights fit float16.
    """
    if step is not None:
        # Of 0, too: 2**-60 leaves room to take it back.
        exponent = tl.maximum((step.to(tl.int32, bitcast=True) >> 23) - 127, -60).to(tl.float32)
        scores += exponent[None, :]
    raised = tl.maximum(sums.maximum, tl.max(scores, axis=1))
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(sums.maximum - shift)
    if step is None:
        total = tl.sum(weights, axis=1)
    else:
        unscaled = tl.exp2(-exponent)
        total = tl.sum(weights * unscaled[None, :], axis=1)
        weights *= (step * unscaled)[None, :]
    weighted = sums.weighted * correction[:, None]
    weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
    return Softmax(raised, sums.total * correction + total, weighted)


@triton.jit
def fold_sinks(sums, sinks):
    """Add one value of 0 a row with scores (ROWS,); the rows have seen something before."""
    raised = tl.maximum(sums.maximum, sinks)
    correction = tl.exp2(sums.maximum - raised)
    total = sums.total * correction + tl.exp2(sinks - raised)
    return Softmax(raised, total, sums.weighted * correction[:, None])


@triton.jit
def cap(scores, soft_cap):
    """soft_cap * tanh(scores / soft_cap), to about 2**-22 of soft_cap; both in base 2."""
    grown = tl.exp2(scores * (2 * LOG2_E / soft_cap))
    return soft_cap - 2 * soft_cap / (1 + grown)


@triton.jit
def add_eighths(x):
    """x (16 n, COLUMNS), row i of every 16 plus row i + 8: (n, 8, COLUMNS).

    One thread holds both in the layout of a matrix product's result.
    """
    rows = tl.reshape(x, [x.shape[0] // 16, 2, 8, x.shape[1]])
    return tl.sum(rows, axis=1)


@triton.jit
def in_float16(q):
    """q (ROWS, PADDED) as float16 times one power of two a row, (ROWS,) float32."""
    largest = tl.max(tl.abs(q.to(tl.float32)), axis=1).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum(largest & 0x7F800000, 0x00800000), 0x7E800000)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) * inverse[:, None]).to(tl.float16), exponent.to(
        tl.float32, bitcast=True
    )


@triton.jit
def leave(sums, out, partial, rows, split, num_tokens, GROUP: tl.constexpr, D: tl.constexpr):
    """Store the rows of a :class:`Softmax` in ``out``, or for :func:`merge_splits` in ``partial``.

    Args:
        out: ``Vectors`` of :mod:`vllm_sparsekv.kernels.attention.arguments`.
        partial: ``Partial``, or None where this is the only split.
        rows: ``Rows``.
    """
    element = tl.arange(0, sums.weighted.shape[1])
    result = sums.weighted / sums.total[:, None]
    if partial is None:
        target, mask = vectors_at(out, rows, element, D)
        tl.store(target, result.to(out.start.dtype.element_ty), mask=mask)
    else:
        num_heads = tl.num_programs(1) * GROUP
        place = (split * num_tokens + rows.token) * num_heads + rows.head
        mask = rows.real[:, None] & (element < D)[None, :]
        tl.store(partial.means + place[:, None] * D + element[None, :], result, mask=mask)
        lse = tl.where(sums.total > 0, sums.maximum + tl.log2(sums.total), float("-inf"))
        tl.store(partial.lse + place, lse, rows.real)


@triton.jit(do_not_specialize=["num_reqs", "num_tokens", "splits"])
def merge_splits(
    partial,
    lse,
    query_start_loc,
    out,
    num_reqs,
    num_tokens,
    splits,
    out_token_stride,
    out_head_stride,
    D: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Merge one token's query head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token < tl.load(query_start_loc + num_reqs):
        element = tl.arange(0, PADDED)[None, :]
        place = token * tl.num_programs(1) + head + tl.zeros([1], tl.int64)
        merged = merge_rows(
            partial,
            lse,
            place,
            tl.full([1], True, tl.int1),
            num_tokens * tl.num_programs(1),
            splits,
            D,
            PADDED,
        )
        target = out + token * out_token_stride + head * out_head_stride
        tl.store(target + element, merged.to(out.dtype.element_ty), mask=element < D)


@triton.jit
def merge_rows(
    partial, lse, place, real, split_stride, splits, D: tl.constexpr, PADDED: tl.constexpr
):
    """(ROWS, PADDED) float32, the means of all splits; a split weighs 2 ** lse.

    Args:
        place: (ROWS,) int64, where the rows are in the first split.
        real: (ROWS,) bool; the others are NaN.
        split_stride: rows of a split.
    """
    element = tl.arange(0, PADDED)[None, :]
    maximum = tl.full(place.shape, float("-inf"), tl.float32)
    total = tl.zeros(place.shape, tl.float32)
    merged = tl.zeros([place.shape[0], PADDED], tl.float32)
    for _split in range(splits):
        part = tl.load(lse + place, mask=real, other=float("-inf"))
        raised = tl.maximum(maximum, part)
        weight = tl.where(part == float("-inf"), 0.0, tl.exp2(part - raised))
        correction = tl.where(maximum == float("-inf"), 0.0, tl.exp2(maximum - raised))
        mask = (element < D) & (weight > 0)[:, None]
        means = tl.load(partial + place[:, None] * D + element, mask=mask, other=0)
        merged = merged * correction[:, None] + weight[:, None] * means
        total = total * correction + weight
        maximum = raised
        place += split_stride
    return merged / total[:, None]
