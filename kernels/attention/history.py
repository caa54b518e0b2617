"""Attention over the history in pages: a split's share of it, tile by tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.dense import ring_holds
from vllm_sparsekv.kernels.attention.launch import MIN_TILES
from vllm_sparsekv.kernels.attention.parts import join_rows
from vllm_sparsekv.kernels.attention.scores import tile_scores
from vllm_sparsekv.kernels.attention.softmax import Softmax, add_eighths, cap
from vllm_sparsekv.kernels.attention.unpack import (
    code_step,
    code_zero,
    encoded_order,
    load_scale,
    log2_step,
    prefetch,
    unpack_tile,
)
from vllm_sparsekv.kernels.triton import AUTO, INT4


class _Sums(NamedTuple):
    """A softmax over tiles, transposed; float32.

    Sums over tokens stay apart by their place in the tile until all tiles are done.

    Attributes:
        maximum: (ROWS,).
        totals: (TILE // 16, 8, ROWS), of weights.
        zeros: (TILE // 16, 8, ROWS), of weights times zeros, for integers in words.
        weighted: (PART, ROWS), sums of values as unpacked, and (REST, ROWS) where one tile is not
            enough.
    """

    maximum: Any
    totals: Any
    zeros: Any
    weighted: Any


@triton.jit
def attend_history(
    queries,
    pages,
    ring,
    ring_slots,
    split,
    context,
    oldest,
    soft_cap,
    BLOCK_SIZE: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``Softmax`` over a split's share of the positions that any row sees and the ring lacks.

    Args:
        queries: of ``queries_for``.
        pages, ring: of one head and request; the ring may be None.
        context: tokens of the history.
        oldest: ``Oldest`` positions seen, or None for all.
        soft_cap: bound of scores in base 2, or None.
        PART, REST: elements of the tiles that values are unpacked to.
        DTYPE: of the model.
    """
    # The words of quantised codecs unpack to float16, whatever the model dtype.
    V_DTYPE: tl.constexpr = DTYPE if V[0] == AUTO or WORDS == 0 else tl.float16
    PAGE_BYTES: tl.constexpr = V[5] + BLOCK_SIZE * V[6]
    ROWS: tl.constexpr = queries.scale.shape[0]
    weighted = (tl.zeros([PART, ROWS], tl.float32),)
    if REST > 0:
        weighted = (weighted[0], tl.zeros([REST, ROWS], tl.float32))
    sums = _Sums(
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([TILE // 16, 8, ROWS], tl.float32),
        tl.zeros([TILE // 16, 8, ROWS], tl.float32),
        weighted,
    )

    tile_start, whole_start, whole_end, tile_end = _share(split, context, oldest, WINDOW, TILE)
    for masked in tl.static_range(2):
        # Whole tiles first, then those that a window or the end of the history cuts into. The ones
        # before the whole tiles are counted as if they came right before the ones after.
        tail_start = tl.maximum(whole_start, whole_end)
        loop_start = tail_start - (whole_start - tile_start) if masked else whole_start
        loop_end = tile_end if masked else whole_end
        for index in tl.range(loop_start, loop_end, num_stages=STAGES):
            tile = index
            if masked and oldest is not None:
                tile -= tl.where(index < tail_start, tail_start - whole_start, 0)
            position = tile * TILE + tl.arange(0, TILE)
            visible = None
            if masked:
                visible = _needed(
                    position, context, oldest, ring, ring_slots, SLOTS_PER_BLOCK, WINDOW
                )
            page, offset = _locate(
                pages, tile, context, oldest, BLOCK_SIZE, PAGE_BYTES, TILE, WORDS
            )
            scores = tile_scores(page, offset, visible, queries, K, K2, WORDS)
            scale = queries.scale
            if soft_cap is not None:
                scores = cap(scores * scale[None, :], soft_cap)
                scale = tl.full([ROWS], 1.0, tl.float32)
            if masked:
                seen = visible[:, None]
                if oldest is not None:
                    seen &= position[:, None] >= oldest.of_rows[None, :]
                scores = tl.where(seen, scores, float("-inf"))
            sums = _add_values(sums, scores, scale, page, offset, visible, V, V_DTYPE, WORDS)
    return _collect(sums, V, WORDS)


@triton.jit
def _share(split, context, oldest, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """A split's first tile, first and end of those that need no mask, end of all.

    Either range may end before its start, and then is empty.
    """
    num_tiles = tl.cdiv(context, TILE)
    first_tile = 0
    if oldest is not None:
        first_tile = tl.minimum(tl.maximum(oldest.of_any, 0) // TILE, num_tiles)
    seen_tiles = num_tiles - first_tile
    splits = tl.minimum(tl.num_programs(2), tl.cdiv(seen_tiles, MIN_TILES))
    share = tl.cdiv(seen_tiles, tl.maximum(splits, 1))
    start = first_tile + split * share
    end = tl.minimum(start + share, num_tiles)
    whole_start = start
    if oldest is not None:
        seen_by_all = tl.cdiv(tl.maximum(oldest.of_all, 0), TILE)
        whole_start = tl.maximum(start, tl.minimum(seen_by_all, end))
    whole_end = tl.minimum(tl.maximum(context - WINDOW, 0) // TILE, end)
    return start, whole_start, whole_end, end


@triton.jit
def _needed(
    position,
    context,
    oldest,
    ring,
    ring_slots,
    SLOTS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Which positions (TILE,) some row sees and the ring lacks; others may be anybody's."""
    needed = position < context
    if oldest is not None:
        needed &= position >= oldest.of_any
    if WINDOW > 0:
        held = ring_holds(ring, ring_slots, position, needed, SLOTS_PER_BLOCK)
        needed &= ~held | (position < context - WINDOW)
    return needed


@triton.jit
def _locate(
    pages,
    tile,
    context,
    oldest,
    BLOCK_SIZE: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Pointers to the pages of a tile's tokens, (TILE,) or one for all, and their places there."""
    if BLOCK_SIZE % TILE == 0:
        index = tile * TILE // BLOCK_SIZE
        block = tl.load(pages.table + index)
        if WORDS > 0:
            # The next block's bytes, as many in a tile as there are tiles in a block.
            ahead = tl.minimum(index + 1, (context - 1) // BLOCK_SIZE)
            ahead = tl.load(pages.table + ahead).to(tl.int64) * pages.block_stride
            part = tile * TILE % BLOCK_SIZE * PAGE_BYTES // BLOCK_SIZE
            prefetch(pages.start + ahead + part, PAGE_BYTES * TILE // BLOCK_SIZE)
        offset = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
    else:
        position = tile * TILE + tl.arange(0, TILE)
        inside_table = position < context
        if oldest is not None:
            inside_table &= position >= oldest.of_any
        block = tl.load(pages.table + position // BLOCK_SIZE, mask=inside_table, other=0)
        offset = position % BLOCK_SIZE
    return pages.start + block.to(tl.int64) * pages.block_stride, offset


@triton.jit
def _add_values(
    sums,
    scores,
    scale,
    page,
    offset,
    visible,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add a tile's values with scores (TILE, ROWS) to :class:`_Sums`; ``scale`` is (ROWS,)."""
    PART: tl.constexpr = sums.weighted[0].shape[0]
    maximum = sums.maximum
    zeros = sums.zeros
    v_step, v_zero = 1.0, 0
    if V[0] >= INT4:
        v_step, v_zero = load_scale(page, offset, visible, V, WORDS)
    v = unpack_tile(page, offset, v_step, v_zero, visible, V, 0, PART, DTYPE, WORDS)
    if WORDS > 0 and V[0] >= INT4:
        # Steps join the weights before the maximum is taken, so that these fit float16.
        step = log2_step(v_step)
        scores = scores * scale[None, :] + step[:, None]
        raised = tl.maximum(maximum, tl.max(scores, axis=0))
        shift = raised
        if visible is not None:
            shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - shift[None, :])
        correction = tl.exp2(maximum - shift)
        unscaled = add_eighths(weights * tl.exp2(-step)[:, None])
        totals = sums.totals * correction[None, None, :] + unscaled
        zeros = zeros * correction[None, None, :] + add_eighths(weights * v_zero[:, None])
    else:
        raised = tl.maximum(maximum, tl.max(scores, axis=0) * scale)
        shift = raised
        if visible is not None:
            shift = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores * scale[None, :] - shift[None, :])
        correction = tl.exp2(maximum - shift)
        totals = sums.totals * correction[None, None, :] + add_eighths(weights)
    weights = weights.to(DTYPE)
    first = sums.weighted[0] * correction[None, :]
    first = tl.dot(tl.trans(v), weights, first, input_precision="ieee")
    weighted = (first,)
    if len(sums.weighted) > 1:
        REST: tl.constexpr = sums.weighted[1].shape[0]
        v = unpack_tile(page, offset, v_step, v_zero, visible, V, PART, REST, DTYPE, WORDS)
        rest = sums.weighted[1] * correction[None, :]
        rest = tl.dot(tl.trans(v), weights, rest, input_precision="ieee")
        weighted = (first, rest)
    return _Sums(raised, totals, zeros, weighted)


@triton.jit
def _collect(sums, V: tl.constexpr, WORDS: tl.constexpr):
    """:class:`_Sums` as ``Softmax``."""
    CODEC: tl.constexpr = V[0]
    total = tl.sum(tl.sum(sums.totals, axis=1), axis=0)
    weighted = sums.weighted[0]
    if len(sums.weighted) > 1:
        weighted = join_rows(weighted, sums.weighted[1])
    if WORDS > 0 and CODEC >= INT4:
        zero = tl.sum(tl.sum(sums.zeros, axis=1), axis=0) * code_zero(CODEC)
        if V[2] == 0:
            weighted = encoded_order(weighted, CODEC)
        weighted = (weighted - zero[None, :]) * code_step(CODEC)
    return Softmax(sums.maximum, total, tl.trans(weighted))
