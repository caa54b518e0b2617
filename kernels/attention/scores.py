"""What keys of two bands need in attention: queries in halves, scores of the second halves."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.unpack import (
    code_step,
    code_zero,
    decoded_query,
    load_scale,
    unpack_tile,
)


@triton.jit
def load_halves(query, real, D: tl.constexpr, PADDED: tl.constexpr):
    """Queries (ROWS, PADDED) from pointers (ROWS, 1), each half of D elements padded by itself."""
    place = tl.arange(0, PADDED) % (PADDED // 2)
    element = tl.arange(0, PADDED) // (PADDED // 2) * (D // 2) + place
    mask = real[:, None] & (place < D // 2)[None, :]
    return tl.load(query + element[None, :], mask=mask, other=0)


@triton.jit
def second_query(q, K: tl.constexpr, K2: tl.constexpr, WORDS: tl.constexpr):
    """Columns of q (ROWS, PADDED // 2) and what the zeros of keys count with, in units of ``K``."""
    if WORDS > 0:
        q = (q * (code_step(K2[0]) / code_step(K[0]))).to(q.dtype)
        query_sum = tl.sum(q.to(tl.float32), axis=1) * code_zero(K2[0])
        return tl.trans(decoded_query(q, K2[0])), query_sum
    else:
        return tl.trans(q), None


@triton.jit
def second_scores(
    page,
    offset,
    visible,
    operands,
    K2: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Products (TILE, ROWS) of the second halves of stored keys and queries.

    Args:
        page, offset, visible, DTYPE, WORDS: as of ``unpack_tile``.
        operands: of :func:`second_query`.
    """
    columns, query_sum = operands
    step, zero = load_scale(page, offset, visible, K2, WORDS)
    k = unpack_tile(page, offset, step, zero, visible, K2, 0, columns.shape[0], DTYPE, WORDS)
    scores = tl.dot(k, columns, input_precision="ieee")
    if WORDS > 0:
        scores = (scores - query_sum[None, :] * zero[:, None]) * step[:, None]
    return scores
