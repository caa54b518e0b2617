"""Products of queries and stored keys: what a codec makes of the queries, then tile by tile.

Keys of two bands are two vectors; queries come in halves, each multiplied with one of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.arguments import vectors_at
from vllm_sparsekv.kernels.attention.parts import halve, split_columns
from vllm_sparsekv.kernels.attention.softmax import in_float16
from vllm_sparsekv.kernels.attention.unpack import (
    code_step,
    code_zero,
    decoded_query,
    load_scale,
    unpack_tile,
)
from vllm_sparsekv.kernels.triton import AUTO, INT4


class Queries(NamedTuple):
    """Queries for products with stored keys.

    Attributes:
        columns: (PART, ROWS) of the keys' type in words, and (REST, ROWS) where one tile is not
            enough.
        query_sum: (ROWS,) float32, what a zero of integers in words counts with, else zeros.
        second: the same two of the second band, of one tile, or nothing.
        scale: (ROWS,) float32, makes scores in base 2 of the products.
    """

    columns: Any
    query_sum: Any
    second: Any
    scale: Any


@triton.jit
def load_queries(query, rows, D: tl.constexpr, PADDED: tl.constexpr, K2: tl.constexpr):
    """Queries (ROWS, PADDED); for keys of two bands each half is padded by itself."""
    if K2 is None:
        source, mask = vectors_at(query, rows, tl.arange(0, PADDED), D)
    else:
        place = tl.arange(0, PADDED) % (PADDED // 2)
        element = tl.arange(0, PADDED) // (PADDED // 2) * (D // 2) + place
        source, _ = vectors_at(query, rows, element, D)
        mask = rows.real[:, None] & (place < D // 2)[None, :]
    return tl.load(source, mask=mask, other=0)


@triton.jit
def queries_for(
    q,
    scale,
    K: tl.constexpr,
    K2: tl.constexpr,
    REST: tl.constexpr,
    WORDS: tl.constexpr,
):
    """:class:`Queries` of q (ROWS, PADDED); ``scale`` makes scores in base 2 of q . k."""
    CODEC: tl.constexpr = K[0]
    WHOLE: tl.constexpr = K[2] == 0
    CODES: tl.constexpr = WORDS > 0 and CODEC >= INT4
    DTYPE: tl.constexpr = q.dtype if CODEC == AUTO or WORDS == 0 else tl.float16
    query_sum = tl.zeros([q.shape[0]], tl.float32)
    k_scale = tl.full([q.shape[0]], 1.0, tl.float32) * scale
    if q.dtype != DTYPE or (CODES and WHOLE):
        # Below 2 in float16: decoded_query multiplies by up to 128.
        q, row_scale = in_float16(q)
        k_scale *= row_scale
    second = ()
    if K2 is not None:
        q, q2 = halve(q)
        second = second_query(q2, K, K2, WORDS)
    if CODES:
        query_sum = tl.sum(q.to(tl.float32), axis=1) * code_zero(CODEC)
        k_scale *= code_step(CODEC)
        if WHOLE:
            q = decoded_query(q, CODEC)
    if K2 is None and REST > 0:
        first, rest = split_columns(q)
        columns = (tl.trans(first), tl.trans(rest))
    else:
        columns = (tl.trans(q),)
    return Queries(columns, query_sum, second, k_scale)


@triton.jit
def tile_scores(
    page,
    offset,
    visible,
    queries,
    K: tl.constexpr,
    K2: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Products (TILE, ROWS) of stored keys and queries, not yet scaled.

    Args:
        page, offset, visible, WORDS: as of ``unpack_tile``.
        queries: of :func:`queries_for`.
    """
    columns = queries.columns
    DTYPE: tl.constexpr = columns[0].dtype
    PART: tl.constexpr = columns[0].shape[0]
    step, zero = 1.0, 0
    if K[0] >= INT4:
        step, zero = load_scale(page, offset, visible, K, WORDS)
    k = unpack_tile(page, offset, step, zero, visible, K, 0, PART, DTYPE, WORDS)
    scores = tl.dot(k, columns[0], input_precision="ieee")
    if len(columns) > 1:
        REST: tl.constexpr = columns[1].shape[0]
        k = unpack_tile(page, offset, step, zero, visible, K, PART, REST, DTYPE, WORDS)
        scores = tl.dot(k, columns[1], scores, input_precision="ieee")
    if WORDS > 0 and K[0] >= INT4:
        scores = (scores - queries.query_sum[None, :] * zero[:, None]) * step[:, None]
    if K2 is not None:
        scores += second_scores(page, offset, visible, queries.second, K2, DTYPE, WORDS)
    return scores


@triton.jit
def second_query(q, K: tl.constexpr, K2: tl.constexpr, WORDS: tl.constexpr):
    """Columns of q (ROWS, PADDED // 2) and what the zeros of keys count with, in units of ``K``."""
    if WORDS > 0:
        q = (q * (code_step(K2[0]) / code_step(K[0]))).to(q.dtype)
        query_sum = tl.sum(q.to(tl.float32), axis=1) * code_zero(K2[0])
        return tl.trans(decoded_query(q, K2[0])), query_sum
    else:
        return tl.trans(q), tl.zeros([q.shape[0]], tl.float32)


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
