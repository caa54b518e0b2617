"""Online softmax in Triton, what the attention kernel shares: one tile, and the splits' merge."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(maximum, total, weighted, scores, v):
    """Online softmax in base 2: add values v (n, PADDED), weighted by 2 ** scores (ROWS, n)."""
    raised = tl.maximum(maximum, tl.max(scores, axis=1))
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - shift[:, None])
    correction = tl.exp2(maximum - shift)
    total = total * correction + tl.sum(weights, axis=1)
    weighted = weighted * correction[:, None]
    weighted = tl.dot(weights.to(v.dtype), v, weighted, input_precision="ieee")
    return raised, total, weighted


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
    """Merge one token's query head; a split weighs 2 ** lse."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token < tl.load(query_start_loc + num_reqs):
        num_heads = tl.num_programs(1)
        element = tl.arange(0, PADDED)
        maximum = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        merged = tl.zeros([PADDED], tl.float32)
        for split in range(splits):
            place = (split * num_tokens + token) * num_heads + head
            part = tl.load(lse + place)
            raised = tl.maximum(maximum, part)
            weight = tl.where(part == float("-inf"), 0.0, tl.exp2(part - raised))
            correction = tl.where(maximum == float("-inf"), 0.0, tl.exp2(maximum - raised))
            mask = (element < D) & (weight > 0)
            merged = merged * correction + weight * tl.load(
                partial + place * D + element, mask=mask, other=0
            )
            total = total * correction + weight
            maximum = raised
        target = out + token * out_token_stride + head * out_head_stride
        tl.store(target + element, (merged / total).to(out.dtype.element_ty), mask=element < D)
