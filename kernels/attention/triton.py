"""Paged attention over sparse pages in Triton: split-KV, one pass over pages, window, step.

One program attends with a tile of queries of one request and one KV head: the query heads that
share the KV head are columns of one matrix product (GQA packed), tokens its rows. It walks its
share of the pruned history tile by tile (``history.py``), the first split also the window and
the step's own keys and values (``dense.py``), and leaves a softmax-weighted mean with its
log-sum-exp; a second kernel merges the splits (``softmax.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.arguments import (
    Oldest,
    Pages,
    Partial,
    Rows,
    Vectors,
    pages_of,
    ring_arguments,
    ring_of,
    vectors_at,
)
from vllm_sparsekv.kernels.attention.dense import attend_ring, attend_step
from vllm_sparsekv.kernels.attention.history import attend_history
from vllm_sparsekv.kernels.attention.launch import (
    attend_constants,
    attend_options,
    capability,
    choose_launch,
    workspace_elements,
)
from vllm_sparsekv.kernels.attention.scores import load_queries, queries_for
from vllm_sparsekv.kernels.attention.softmax import LOG2_E, fold_sinks, leave, merge_splits
from vllm_sparsekv.kernels.triton import find_request


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
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.attention.reference.sparse_attention`.

    Args:
        workspace: float32, at least :func:`workspace_elements`, for the partial sums of the
            splits; allocated here when None.

    Raises:
        ValueError: the workspace is too small or the scale not positive.
    """
    num_tokens, num_heads, size = query.shape
    num_reqs = seq_lens.shape[0]
    if num_tokens == 0 or num_reqs == 0:
        return
    partial, splits = attend(
        query,
        key,
        value,
        pages,
        window,
        query_start_loc,
        seq_lens,
        block_table,
        window_block_table,
        scale,
        fmt,
        out,
        sliding_window,
        soft_cap,
        sinks,
        workspace,
    )
    if partial is not None:
        merge_splits[num_tokens, num_heads](
            *partial,
            query_start_loc,
            out,
            num_reqs,
            num_tokens,
            splits,
            *out.stride()[:2],
            D=size,
            PADDED=triton.next_power_of_2(size),
            num_warps=1,
        )


def attend(
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
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    workspace: torch.Tensor | None,
) -> tuple[Partial | None, int]:
    """As :func:`sparse_attention` of at least one token, but for the merge of several splits.

    Returns:
        what is to be merged, None where ``out`` is complete, and the number of splits.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale}: must be positive")
    num_tokens, num_heads, _ = query.shape
    num_reqs, num_kv_heads = seq_lens.shape[0], key.shape[1]
    group, block_size = num_heads // num_kv_heads, pages.shape[2]
    launch = choose_launch(
        query, num_kv_heads, num_reqs, block_table.shape[1] * block_size, sliding_window
    )
    partial = None
    if launch.splits > 1:
        needed = workspace_elements(query, launch)
        if workspace is None:
            workspace = torch.empty(needed, dtype=torch.float32, device=query.device)
        if workspace.numel() < needed:
            raise ValueError(f"workspace={workspace.numel()} elements: must be >= {needed}")
        partial = Partial(workspace, workspace[launch.splits * query.numel() :])

    ring, ring_slots, slots_per_block = None, 0, 0
    if window is not None:
        slots_per_block = window.shape[2]
        ring_slots = window_block_table.shape[1] * slots_per_block
        ring = ring_arguments(window, window_block_table)
    tiles = num_tokens // (launch.rows // group) + num_reqs
    target = capability(query.device)
    _attend[tiles, num_kv_heads, launch.splits](
        Vectors(query, *query.stride()[:2]),
        Vectors(key, *key.stride()[:2]),
        Vectors(value, *value.stride()[:2]),
        Pages(pages, *pages.stride()[:2], block_table, block_table.stride(0)),
        ring,
        Vectors(out, *out.stride()[:2]),
        partial,
        query_start_loc,
        seq_lens,
        num_reqs,
        num_tokens,
        ring_slots,
        scale * LOG2_E.value,
        sliding_window,
        None if soft_cap is None else soft_cap * LOG2_E.value,
        sinks,
        **attend_constants(fmt, group, block_size, slots_per_block, launch, target),
        **attend_options(fmt, launch, target),
    )
    return partial, launch.splits


@triton.jit(do_not_specialize=["num_reqs", "num_tokens", "ring_slots", "sliding_window"])
def _attend(
    query,
    key,
    value,
    pages,
    ring,
    out,
    partial,
    query_start_loc,
    seq_lens,
    num_reqs,
    num_tokens,
    ring_slots,
    scale,
    sliding_window,
    soft_cap,
    sinks,
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
    RING_TILE: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend with up to ROWS // GROUP tokens of a request: program (tile, KV head, split).

    Groups are those of :mod:`vllm_sparsekv.kernels.attention.arguments`; what is None does not
    apply. ``scale`` and ``soft_cap`` are those of scores in base 2.
    """
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
    rows = Rows(
        (start + local).to(tl.int64),
        local,
        head * GROUP + row % GROUP,
        (row < TOKENS * GROUP) & (local < length),
    )
    oldest = None
    if sliding_window is not None:
        behind = context - sliding_window
        end = tl.minimum(first + TOKENS, length)
        oldest = Oldest(behind + first + 1, behind + end, behind + local + 1)
    pages = pages_of(pages, request, head)
    if WINDOW > 0:
        ring = ring_of(ring, request, head, D)
    q = load_queries(query, rows, D, PADDED, K2)
    sums = attend_history(
        queries_for(q, scale, K, K2, REST, WORDS),
        pages,
        ring,
        ring_slots,
        split,
        context,
        oldest,
        soft_cap,
        BLOCK_SIZE,
        SLOTS_PER_BLOCK,
        WINDOW,
        PART,
        REST,
        TILE,
        K,
        K2,
        V,
        WORDS,
        q.dtype,
        STAGES,
    )
    if split == 0:
        # Again, instead of registers for it all through the history.
        source, mask = vectors_at(query, rows, tl.arange(0, PADDED), D)
        q = tl.load(source, mask=mask, other=0)
        if WINDOW > 0:
            sums = attend_ring(
                sums,
                q,
                ring,
                ring_slots,
                context,
                oldest,
                scale,
                soft_cap,
                WINDOW,
                SLOTS_PER_BLOCK,
                RING_TILE,
                D,
            )
        sums = attend_step(
            sums,
            q,
            key,
            value,
            start,
            head,
            rows,
            tl.minimum(first + TOKENS, length),
            length,
            context,
            oldest,
            scale,
            soft_cap,
            DENSE_TILE,
            D,
        )
        if sinks is not None:
            sums = fold_sinks(sums, tl.load(sinks + rows.head).to(tl.float32) * LOG2_E)
    leave(sums, out, partial, rows, split, num_tokens, GROUP, D)
