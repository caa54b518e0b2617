"""Paged attention over sparse pages in Triton: split-KV, one pass over pages, window, step.

One program attends with a tile of queries of one request and one KV head: the query heads that
share the KV head are columns of one matrix product (GQA packed), tokens its rows. It walks its
share of the pruned history tile by tile, the first split also the dense window and the step's own
keys and values, and leaves a softmax-weighted mean with its log-sum-exp; a second kernel merges the
splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.launch import (
    MIN_TILES,
    attend_constants,
    attend_options,
    capability,
    choose_launch,
    workspace_elements,
)
from vllm_sparsekv.kernels.attention.parts import halve, join_rows, split_columns
from vllm_sparsekv.kernels.attention.scores import load_halves, second_query, second_scores
from vllm_sparsekv.kernels.attention.softmax import add_eighths, fold, in_float16, merge_splits
from vllm_sparsekv.kernels.attention.unpack import (
    code_step,
    code_zero,
    decoded_query,
    encoded_order,
    load_scale,
    log2_step,
    prefetch,
    unpack_tile,
)
from vllm_sparsekv.kernels.triton import AUTO, INT4, find_request

LOG2_E = 1.4426950408889634


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor | None,
    scale: float,
    fmt: SparseFormat,
    out: torch.Tensor,
    *,
    workspace: torch.Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.attention.reference.sparse_attention`.

    Args:
        workspace: float32, at least :func:`workspace_elements`, for the partial sums of the
            splits; allocated here when None.

    Raises:
        ValueError: the workspace is too small or the scale not positive.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale}: must be positive")
    num_tokens, num_heads, size = query.shape
    num_reqs, num_kv_heads = seq_lens.shape[0], key.shape[1]
    if num_tokens == 0 or num_reqs == 0:
        return
    group = num_heads // num_kv_heads
    launch = choose_launch(query, num_kv_heads, num_reqs, block_table.shape[1] * pages.shape[2])
    partial = lse = out
    if launch.splits > 1:
        needed = workspace_elements(query, launch)
        if workspace is None:
            workspace = torch.empty(needed, dtype=torch.float32, device=query.device)
        if workspace.numel() < needed:
            raise ValueError(f"workspace={workspace.numel()} elements: must be >= {needed}")
        partial = workspace
        lse = workspace[launch.splits * query.numel() :]

    slots_per_block, window_strides, tag_strides, tags = 0, (0, 0, 0), (0, 0, 0), seq_lens
    if window is not None:
        slots_per_block = window.shape[2]
        tags = window.view(torch.int32)
        window_strides, tag_strides = window.stride()[:3], tags.stride()[:3]
    ring_blocks = 0 if window is None else window_block_table.shape[1]
    tiles = num_tokens // (launch.rows // group) + num_reqs
    target = capability(query.device)
    _attend[tiles, num_kv_heads, launch.splits](
        query,
        key,
        value,
        pages,
        query if window is None else window,
        tags,
        query_start_loc,
        seq_lens,
        block_table,
        block_table if window is None else window_block_table,
        out,
        partial,
        lse,
        scale * LOG2_E,
        num_reqs,
        num_tokens,
        ring_blocks * slots_per_block,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *pages.stride()[:2],
        *window_strides,
        *tag_strides,
        block_table.stride(0),
        0 if window is None else window_block_table.stride(0),
        *out.stride()[:2],
        **attend_constants(fmt, group, pages.shape[2], slots_per_block, launch, target),
        **attend_options(fmt, launch, target),
    )
    if launch.splits > 1:
        merge_splits[num_tokens, num_heads](
            partial,
            lse,
            query_start_loc,
            out,
            num_reqs,
            num_tokens,
            launch.splits,
            *out.stride()[:2],
            D=size,
            PADDED=triton.next_power_of_2(size),
            num_warps=1,
        )


@triton.jit(do_not_specialize=["num_reqs", "num_tokens", "ring"])
def _attend(
    query,
    key,
    value,
    pages,
    window,
    tags,
    query_start_loc,
    seq_lens,
    block_table,
    window_block_table,
    out,
    partial,
    lse,
    scale,
    num_reqs,
    num_tokens,
    ring,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    page_block_stride,
    page_head_stride,
    window_block_stride,
    window_head_stride,
    window_slot_stride,
    tag_block_stride,
    tag_head_stride,
    tag_slot_stride,
    table_stride,
    window_table_stride,
    out_token_stride,
    out_head_stride,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    PART: tl.constexpr,
    REST: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    TOKENS: tl.constexpr = ROWS // GROUP
    tile_index = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    request = find_request(query_start_loc, num_reqs, tile_index, TOKENS)
    start = tl.load(query_start_loc + request)
    length = tl.load(query_start_loc + request + 1) - start
    first = (tile_index - start // TOKENS - request) * TOKENS
    if first >= length:
        return
    context = tl.load(seq_lens + request) - length

    row = tl.arange(0, ROWS)
    local = first + row // GROUP
    query_head = head * GROUP + row % GROUP
    token = (start + local).to(tl.int64)
    real = (row < TOKENS * GROUP) & (local < length)
    element = tl.arange(0, PADDED)
    inside = element < D
    query += token[:, None] * query_token_stride + query_head[:, None] * query_head_stride
    if K2 is None:
        q = tl.load(query + element[None, :], mask=real[:, None] & inside[None, :], other=0)
    else:
        q = load_halves(query, real, D, PADDED)

    PAGE_BYTES: tl.constexpr = V[5] + BLOCK_SIZE * V[6]
    K_CODEC: tl.constexpr = K[0]
    V_CODEC: tl.constexpr = V[0]
    K_BITMAP_BYTES: tl.constexpr = K[2]
    V_BITMAP_BYTES: tl.constexpr = V[2]
    K_PART: tl.constexpr = PART if K2 is None else PADDED // 2
    K_REST: tl.constexpr = REST if K2 is None else 0
    # The words of quantised codecs unpack to float16, whatever the model dtype.
    K_DTYPE: tl.constexpr = q.dtype if K_CODEC == AUTO or WORDS == 0 else tl.float16
    V_DTYPE: tl.constexpr = q.dtype if V_CODEC == AUTO or WORDS == 0 else tl.float16
    K_CODES: tl.constexpr = WORDS > 0 and K_CODEC >= INT4
    V_CODES: tl.constexpr = WORDS > 0 and V_CODEC >= INT4
    k_query = q
    k_scale = tl.full([ROWS], 1.0, tl.float32) * scale
    if q.dtype != K_DTYPE or (K_CODES and K_BITMAP_BYTES == 0):
        # Below 2 in float16: decoded_query multiplies by up to 128.
        k_query, row_scale = in_float16(q)
        k_scale *= row_scale
    if K2 is not None:
        k_query, k2_query = halve(k_query)
        k2_operands = second_query(k2_query, K, K2, WORDS)
    if K_CODES:
        query_sum = tl.sum(k_query.to(tl.float32), axis=1) * code_zero(K_CODEC)
        k_scale *= code_step(K_CODEC)
        if K_BITMAP_BYTES == 0:
            k_query = decoded_query(k_query, K_CODEC)

    # Sums over tokens stay apart by their place in the tile until all tiles are done.
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    totals = tl.zeros([TILE // 16, 8, ROWS], tl.float32)
    zeros = tl.zeros([TILE // 16, 8, ROWS], tl.float32)
    weighted = tl.zeros([PART, ROWS], tl.float32)
    if REST > 0:
        weighted_rest = tl.zeros([REST, ROWS], tl.float32)
    if K_REST > 0:
        k_query, rest = split_columns(k_query)
        query_columns_rest = tl.trans(rest)
    query_columns = tl.trans(k_query)

    # The ring's tags decide which of the last WINDOW tokens of the history it replaces.
    tags += head * tag_head_stride + 2 * D * q.dtype.primitive_bitwidth // 32
    window_block_table += request * window_table_stride
    block_table += request * table_stride
    pages += head * page_head_stride
    num_tiles = tl.cdiv(context, TILE)
    splits = tl.minimum(tl.num_programs(2), tl.cdiv(num_tiles, MIN_TILES))
    share = tl.cdiv(num_tiles, tl.maximum(splits, 1))
    tile_start = split * share
    tile_end = tl.minimum(tile_start + share, num_tiles)
    whole_end = tl.minimum(tl.maximum(context - WINDOW, 0) // TILE, tile_end)
    for masked in tl.static_range(2):
        # Whole tiles first, then those that the window or the end of the history cuts into.
        loop_start = tl.maximum(tile_start, whole_end) if masked else tile_start
        loop_end = tile_end if masked else whole_end
        for tile in tl.range(loop_start, loop_end, num_stages=STAGES):
            position = tile * TILE + tl.arange(0, TILE)
            visible = None
            if masked:
                visible = position < context
                if WINDOW > 0:
                    place = position % ring
                    block = tl.load(
                        window_block_table + place // SLOTS_PER_BLOCK, mask=visible, other=0
                    ).to(tl.int64)
                    slot = (place % SLOTS_PER_BLOCK) * tag_slot_stride
                    tag = tl.load(tags + block * tag_block_stride + slot, mask=visible, other=0)
                    visible &= (tag != position + 1) | (position < context - WINDOW)
            if BLOCK_SIZE % TILE == 0:
                index = tile * TILE // BLOCK_SIZE
                block = tl.load(block_table + index)
                if WORDS > 0:
                    # The next block's bytes, as many in a tile as there are tiles in a block.
                    ahead = tl.minimum(index + 1, (context - 1) // BLOCK_SIZE)
                    ahead = tl.load(block_table + ahead).to(tl.int64) * page_block_stride
                    part = tile * TILE % BLOCK_SIZE * PAGE_BYTES // BLOCK_SIZE
                    prefetch(pages + ahead + part, PAGE_BYTES * TILE // BLOCK_SIZE)
                offset = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
            else:
                inside_table = position < context
                block = tl.load(block_table + position // BLOCK_SIZE, mask=inside_table, other=0)
                offset = position % BLOCK_SIZE
            page = pages + block.to(tl.int64) * page_block_stride
            k_step, k_zero, v_step, v_zero = 1.0, 0, 1.0, 0
            if K_CODEC >= INT4:
                k_step, k_zero = load_scale(page, offset, visible, K, WORDS)
            k = unpack_tile(page, offset, k_step, k_zero, visible, K, 0, K_PART, K_DTYPE, WORDS)
            scores = tl.dot(k, query_columns, input_precision="ieee")
            if K_REST > 0:
                k = unpack_tile(
                    page, offset, k_step, k_zero, visible, K, PART, REST, K_DTYPE, WORDS
                )
                scores = tl.dot(k, query_columns_rest, scores, input_precision="ieee")
            if K_CODES:
                scores = (scores - query_sum[None, :] * k_zero[:, None]) * k_step[:, None]
            if K2 is not None:
                scores += second_scores(page, offset, visible, k2_operands, K2, K_DTYPE, WORDS)
            if masked:
                scores = tl.where(visible[:, None], scores, float("-inf"))
            if V_CODEC >= INT4:
                v_step, v_zero = load_scale(page, offset, visible, V, WORDS)
            v = unpack_tile(page, offset, v_step, v_zero, visible, V, 0, PART, V_DTYPE, WORDS)
            if V_CODES:
                # Steps join the weights before the maximum is taken, so that these fit float16.
                step = log2_step(v_step)
                scores = scores * k_scale[None, :] + step[:, None]
                raised = tl.maximum(maximum, tl.max(scores, axis=0))
                shift = tl.where(raised == float("-inf"), 0.0, raised) if masked else raised
                weights = tl.exp2(scores - shift[None, :])
                correction = tl.exp2(maximum - shift)
                unscaled = add_eighths(weights * tl.exp2(-step)[:, None])
                totals = totals * correction[None, None, :] + unscaled
                zeros = zeros * correction[None, None, :] + add_eighths(weights * v_zero[:, None])
            else:
                raised = tl.maximum(maximum, tl.max(scores, axis=0) * k_scale)
                shift = tl.where(raised == float("-inf"), 0.0, raised) if masked else raised
                weights = tl.exp2(scores * k_scale[None, :] - shift[None, :])
                correction = tl.exp2(maximum - shift)
                totals = totals * correction[None, None, :] + add_eighths(weights)
            maximum = raised
            weights = weights.to(V_DTYPE)
            weighted *= correction[None, :]
            weighted = tl.dot(tl.trans(v), weights, weighted, input_precision="ieee")
            if REST > 0:
                v = unpack_tile(
                    page, offset, v_step, v_zero, visible, V, PART, REST, V_DTYPE, WORDS
                )
                weighted_rest *= correction[None, :]
                weighted_rest = tl.dot(tl.trans(v), weights, weighted_rest, input_precision="ieee")
    total = tl.sum(tl.sum(totals, axis=1), axis=0)
    if REST > 0:
        weighted = join_rows(weighted, weighted_rest)
    if V_CODES:
        zero = tl.sum(tl.sum(zeros, axis=1), axis=0) * code_zero(V_CODEC)
        if V_BITMAP_BYTES == 0:
            weighted = encoded_order(weighted, V_CODEC)
        weighted = (weighted - zero[None, :]) * code_step(V_CODEC)
    weighted = tl.trans(weighted)

    if split == 0:
        # Again, instead of registers for it all through the history.
        q = tl.load(query + element[None, :], mask=real[:, None] & inside[None, :], other=0)
        if WINDOW > 0:
            window += head * window_head_stride
            for ring_start in tl.range(0, ring, DENSE_TILE):
                place = ring_start + tl.arange(0, DENSE_TILE)
                block = tl.load(
                    window_block_table + place // SLOTS_PER_BLOCK, mask=place < ring, other=0
                ).to(tl.int64)
                slot = place % SLOTS_PER_BLOCK
                tag = tags + block * tag_block_stride + slot * tag_slot_stride
                # Block 0 is nobody's, a negative one no block.
                position = tl.load(tag, mask=block > 0, other=0) - 1
                usable = (position >= context - WINDOW) & (position < context) & (position >= 0)
                usable &= position % ring == place
                source = (block * window_block_stride + slot * window_slot_stride)[:, None]
                source += element[None, :]
                mask = usable[:, None] & inside[None, :]
                k = tl.load(window + source, mask=mask, other=0)
                v = tl.load(window + D + source, mask=mask, other=0)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                scores = tl.where(usable[None, :], scores, float("-inf"))
                maximum, total, weighted = fold(maximum, total, weighted, scores, v)
        key += start.to(tl.int64) * key_token_stride + head * key_head_stride
        value += start.to(tl.int64) * value_token_stride + head * value_head_stride
        for step_start in tl.range(0, tl.minimum(first + TOKENS, length), DENSE_TILE):
            step = step_start + tl.arange(0, DENSE_TILE)
            mask = (step < length)[:, None] & inside[None, :]
            k = tl.load(
                key + step[:, None] * key_token_stride + element[None, :], mask=mask, other=0
            )
            v = tl.load(
                value + step[:, None] * value_token_stride + element[None, :], mask=mask, other=0
            )
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(step[None, :] <= local[:, None], scores, float("-inf"))
            maximum, total, weighted = fold(maximum, total, weighted, scores, v)

    place = real[:, None] & inside[None, :]
    result = weighted / total[:, None]
    if not SPLIT:
        target = token[:, None] * out_token_stride + query_head[:, None] * out_head_stride
        tl.store(out + target + element[None, :], result.to(out.dtype.element_ty), mask=place)
    else:
        total_heads = tl.num_programs(1) * GROUP
        target = (split * num_tokens + token) * total_heads + query_head
        tl.store(partial + target[:, None] * D + element[None, :], result, mask=place)
        tl.store(lse + target, tl.where(total > 0, maximum + tl.log2(total), float("-inf")), real)
