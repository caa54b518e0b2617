"""Attention over whole vectors: the ring of newest tokens, then the step's own.

Arguments that several functions share:

    sums: ``Softmax`` of what was seen before; the one with these vectors is returned.
    q: (ROWS, PADDED) model dtype.
    oldest: ``Oldest`` positions seen, or None for all.
    scale: makes scores in base 2 of q . k; soft_cap bounds these, or is None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.softmax import cap, fold


@triton.jit
def ring_holds(ring, ring_slots, position, visible, SLOTS_PER_BLOCK: tl.constexpr):
    """Whether the ring has the tokens of those positions (n,) that are visible; bool."""
    place = position % ring_slots
    block = tl.load(ring.table + place // SLOTS_PER_BLOCK, mask=visible, other=0).to(tl.int64)
    slot = (place % SLOTS_PER_BLOCK) * ring.tag_slot_stride
    tag = tl.load(ring.tags + block * ring.tag_block_stride + slot, mask=visible, other=0)
    return tag == position + 1


@triton.jit
def attend_ring(
    sums,
    q,
    ring,
    ring_slots,
    context,
    oldest,
    scale,
    soft_cap,
    WINDOW: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    D: tl.constexpr,
):
    """Add the last WINDOW tokens of the history as far as the ring holds them."""
    element = tl.arange(0, q.shape[1])
    for ring_start in tl.range(0, ring_slots, TILE):
        place = ring_start + tl.arange(0, TILE)
        block = tl.load(ring.table + place // SLOTS_PER_BLOCK, mask=place < ring_slots, other=0)
        block = block.to(tl.int64)
        slot = place % SLOTS_PER_BLOCK
        tag = ring.tags + block * ring.tag_block_stride + slot * ring.tag_slot_stride
        # Block 0 is nobody's, a negative one no block.
        position = tl.load(tag, mask=block > 0, other=0) - 1
        usable = (position >= context - WINDOW) & (position < context) & (position >= 0)
        usable &= position % ring_slots == place
        if oldest is not None:
            usable &= position >= oldest.of_any
        source = (block * ring.block_stride + slot * ring.slot_stride)[:, None] + element[None, :]
        mask = usable[:, None] & (element < D)[None, :]
        k = tl.load(ring.start + source, mask=mask, other=0)
        v = tl.load(ring.start + D + source, mask=mask, other=0)
        units = scale
        value_step = None
        if k.dtype == tl.int8:
            # The model dtype has codes without loss; the interpreter only gets there by float32.
            steps = tl.load(tag + 1, mask=usable, other=0)
            units = scale * (steps << 16).to(tl.float32, bitcast=True)[None, :]
            value_step = (steps & -0x10000).to(tl.float32, bitcast=True)
            k = k.to(tl.float32).to(q.dtype)
            v = v.to(tl.float32).to(q.dtype)
        seen = usable[None, :]
        if oldest is not None:
            seen &= position[None, :] >= oldest.of_rows[:, None]
        sums = _fold_dense(sums, q, k, v, value_step, seen, units, soft_cap)
    return sums


@triton.jit
def attend_step(
    sums,
    q,
    key,
    value,
    start,
    head,
    rows,
    end,
    length,
    context,
    oldest,
    scale,
    soft_cap,
    DENSE_TILE: tl.constexpr,
    D: tl.constexpr,
):
    """Add the tokens of a request's step, causally.

    Args:
        key, value: ``Vectors``.
        start: first token of the request in the batch.
        head: of the keys.
        rows: ``Rows``.
        end: tokens of the step that any row sees.
        length: of the step.
    """
    element = tl.arange(0, q.shape[1])
    keys = key.start + start.to(tl.int64) * key.token_stride + head * key.head_stride
    values = value.start + start.to(tl.int64) * value.token_stride + head * value.head_stride
    first = 0
    if oldest is not None:
        first = tl.maximum(oldest.of_any - context, 0)
    for step_start in tl.range(first, end, DENSE_TILE):
        step = step_start + tl.arange(0, DENSE_TILE)
        mask = (step < length)[:, None] & (element < D)[None, :]
        k = tl.load(keys + step[:, None] * key.token_stride + element[None, :], mask=mask, other=0)
        v = tl.load(
            values + step[:, None] * value.token_stride + element[None, :], mask=mask, other=0
        )
        seen = step[None, :] <= rows.local[:, None]
        if oldest is not None:
            seen &= context + step[None, :] >= oldest.of_rows[:, None]
        sums = _fold_dense(sums, q, k, v, None, seen, scale, soft_cap)
    return sums


@triton.jit
def _fold_dense(sums, q, k, v, value_step, seen, scale, soft_cap):
    """Add keys and values (n, PADDED) where ``seen``; it and scale broadcast to (ROWS, n).

    ``value_step`` (n,) is what values count in, or None.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if soft_cap is not None:
        scores = cap(scores, soft_cap)
    return fold(sums, tl.where(seen, scores, float("-inf")), v, value_step)
