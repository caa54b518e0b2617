"""A layer's step in three launches: what comes before attention, attention, and what comes after.

The first brings queries, keys and values into the basis and packs the latter two. The last merges
the splits of attention, brings its output back and fills the window, which attention has read by
then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.arguments import Vectors, ring_arguments
from vllm_sparsekv.kernels.attention.softmax import merge_rows
from vllm_sparsekv.kernels.attention.triton import attend
from vllm_sparsekv.kernels.pack.triton import ROWS, num_warps, pack_constants, pack_vectors
from vllm_sparsekv.kernels.step.change import PART, Change, change_back, change_rows
from vllm_sparsekv.kernels.step.reference import Batch, Layer
from vllm_sparsekv.kernels.window.triton import write_slot


def step(
    layer: Layer,
    batch: Batch,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    fills_window: bool = True,
    workspace: torch.Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.step.reference.step`."""
    fmt, basis = layer.format, layer.basis
    num_tokens, num_heads, size = query.shape
    num_reqs, num_kv_heads = batch.seq_lens.shape[0], pages.shape[1]
    if num_tokens == 0:
        return
    group = num_heads // num_kv_heads
    asked = query if basis.query is None else torch.empty_like(query, memory_format=_CONTIGUOUS)
    if key is None:
        assert kept is not None
        stored_key, stored_value = kept
    else:
        stored_key = _place(key, basis.key, kept and kept[0])
        stored_value = _place(value, basis.value, kept and kept[1])
    writes = key is not None
    if writes or basis.query is not None:
        parts = (2 if writes else 0) + (basis.query is not None)
        rows = num_tokens * group if basis.query is not None else num_tokens
        _prepare[triton.cdiv(rows, ROWS), num_kv_heads, parts](
            None if basis.query is None else _vectors(query),
            _vectors(key) if writes else None,
            _vectors(value) if writes else None,
            None if basis.query is None else asked,
            stored_key if writes else None,
            stored_value if writes else None,
            _change(basis.query),
            _change(basis.key, basis.key_mean),
            _change(basis.value, basis.value_mean),
            batch.slot_mapping,
            pages,
            pages.stride(0),
            pages.stride(1),
            basis.key_feedback,
            basis.value_feedback,
            num_tokens,
            min(num_tokens, batch.slot_mapping.shape[0]),
            GROUP=group,
            **pack_constants(fmt, pages.shape[2]),
            num_warps=num_warps(size),
        )
    if num_reqs == 0:
        return
    stored = out if basis.output is None else torch.empty_like(asked)
    partial, splits = attend(
        asked,
        stored_key,
        stored_value,
        pages,
        window,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.window_block_table,
        layer.scale,
        fmt,
        stored,
        layer.sliding_window,
        layer.soft_cap,
        layer.sinks,
        workspace,
    )
    restores = partial is not None or basis.output is not None
    blocks = triton.cdiv(num_tokens * group, ROWS) if restores else 0
    fills = window is not None and fills_window
    filled = min(num_tokens, batch.slot_mapping.shape[0]) if fills else 0
    if blocks + filled == 0:
        return
    _finish[blocks + filled, num_kv_heads](
        partial,
        _vectors(stored),
        _vectors(out),
        _change(basis.output, basis.value_mean),
        _vectors(stored_key) if fills else None,
        _vectors(stored_value) if fills else None,
        ring_arguments(window, batch.window_block_table) if fills else None,
        batch.query_start_loc,
        batch.seq_lens,
        batch.slot_mapping,
        num_reqs,
        num_tokens,
        blocks,
        splits,
        batch.window_block_table.shape[1] * window.shape[2] if fills else 0,
        GROUP=group,
        ROWS=ROWS,
        D=size,
        PADDED=triton.next_power_of_2(size),
        SLOTS_PER_BLOCK=window.shape[2] if fills else 0,
        num_warps=num_warps(size),
    )


_CONTIGUOUS = torch.contiguous_format


def _place(x: torch.Tensor, matrix: torch.Tensor | None, kept: torch.Tensor | None) -> torch.Tensor:
    """Where vectors are found in the basis: their own place where nothing changes."""
    if kept is None:
        return x if matrix is None else torch.empty_like(x, memory_format=_CONTIGUOUS)
    return kept if matrix is not None else kept.copy_(x)


def _vectors(x: torch.Tensor) -> Vectors:
    return Vectors(x, *x.stride()[:2])


def _change(matrix: torch.Tensor | None, mean: torch.Tensor | None = None) -> Change | None:
    if matrix is None:
        return None
    return Change(matrix, 0 if matrix.ndim == 2 else matrix.stride(0), mean)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _prepare(
    query,
    key,
    value,
    asked,
    stored_key,
    stored_value,
    query_change,
    key_change,
    value_change,
    slot_mapping,
    pages,
    block_stride,
    head_stride,
    key_feedback,
    value_feedback,
    num_tokens,
    num_slots,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    K_SURVIVORS: tl.constexpr,
    V_SURVIVORS: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    V: tl.constexpr,
):
    """ROWS keys, values or queries of a KV head: program (block of rows, KV head, which of them).

    What is None is not there. ``asked``, ``stored_key`` and ``stored_value`` are contiguous, and
    written where vectors change.
    """
    if key is None:
        _ask(query, asked, query_change, num_tokens, GROUP, ROWS, D)
    else:
        if tl.program_id(2) == 2:
            if query is not None:
                _ask(query, asked, query_change, num_tokens, GROUP, ROWS, D)
        else:
            head = tl.program_id(1)
            row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            real = row < num_tokens
            slot = tl.load(slot_mapping + row, mask=row < num_slots, other=-1)
            page = pages + tl.where(slot >= 0, slot // BLOCK_SIZE * block_stride, 0)
            page += head * head_stride
            offset = (slot % BLOCK_SIZE).to(tl.int32)
            place = (row * tl.num_programs(1) + head) * D
            if tl.program_id(2) == 0:
                key_source = key.start + row * key.token_stride + head * key.head_stride
                target = stored_key + place
                first = _in_basis(key_source, target, real, key_change, head, 0, K[7], D)
                second = None
                if K2 is not None:
                    second = _in_basis(key_source, target, real, key_change, head, K[7], K2[7], D)
                pack_vectors(
                    first,
                    second,
                    slot >= 0,
                    page,
                    offset,
                    key_feedback,
                    head * D * D,
                    K,
                    K2,
                    BITS,
                    K_SURVIVORS,
                    LENGTH,
                    D,
                )
            else:
                value_source = value.start + row * value.token_stride + head * value.head_stride
                whole = _in_basis(
                    value_source, stored_value + place, real, value_change, head, 0, V[7], D
                )
                pack_vectors(
                    whole,
                    None,
                    slot >= 0,
                    page,
                    offset,
                    value_feedback,
                    head * D * D,
                    V,
                    None,
                    BITS,
                    V_SURVIVORS,
                    LENGTH,
                    D,
                )


@triton.jit
def _ask(
    query,
    asked,
    change,
    num_tokens,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """ROWS queries of a KV head, heads of a token together, to the basis of its keys."""
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    of_all = head * GROUP + row % GROUP
    source = query.start + token * query.token_stride + of_all * query.head_stride
    changed = change_rows(source, token < num_tokens, change, head, 0, D, D)
    place = token * tl.num_programs(1) * GROUP + of_all
    _store(changed, asked + place * D, token < num_tokens, D)


@triton.jit
def _in_basis(
    source, stored, real, change, head, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr
):
    """Elements FIRST to FIRST + SIZE of vectors, (ROWS, n) model dtype, stored if they change."""
    if change is None:
        element = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
        mask = real[:, None] & (element < SIZE)
        return tl.load(source[:, None] + FIRST + element, mask=mask, other=0)
    changed = change_rows(source, real, change, head, FIRST, SIZE, D)
    _store(changed, stored + FIRST, real, SIZE)
    return changed.to(stored.dtype.element_ty)


@triton.jit
def _store(x, target, real, SIZE: tl.constexpr):
    element = tl.arange(0, x.shape[1])[None, :]
    mask = real[:, None] & (element < SIZE)
    tl.store(target[:, None] + element, x.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_reqs", "num_tokens", "blocks", "splits", "ring_slots"])
def _finish(
    partial,
    stored,
    out,
    change,
    key,
    value,
    ring,
    query_start_loc,
    seq_lens,
    slot_mapping,
    num_reqs,
    num_tokens,
    blocks,
    splits,
    ring_slots,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
):
    """Of a KV head, ROWS rows of the output, in ``blocks`` programs, then a token's window slot.

    Args:
        partial: ``Partial`` of all splits; None where they are merged in ``stored``.
        change: None where the output is in no basis.
    """
    block = tl.program_id(0)
    head = tl.program_id(1)
    end = tl.load(query_start_loc + num_reqs)
    if block < blocks:
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        token = row // GROUP
        of_all = head * GROUP + row % GROUP
        real = token < end
        element = tl.arange(0, PADDED)[None, :]
        if partial is None:
            source = stored.start + token * stored.token_stride + of_all * stored.head_stride
            x = tl.load(source[:, None] + element, mask=real[:, None] & (element < D), other=0)
        else:
            num_heads = tl.num_programs(1) * GROUP
            place = token * num_heads + of_all
            x = merge_rows(
                partial.means, partial.lse, place, real, num_tokens * num_heads, splits, D, PADDED
            ).to(out.start.dtype.element_ty)
        target = out.start + token * out.token_stride + of_all * out.head_stride
        if change is None:
            _store(x, target, real, D)
        else:
            SIZE: tl.constexpr = min(PADDED, max(16, PART // PADDED))
            for start in tl.static_range(0, D, SIZE):
                changed = change_back(x, change, head, start, SIZE, D)
                _store(changed, target + start, real, D - start)
    elif ring is not None:
        newest = block - blocks
        if newest < end:
            write_slot(
                key,
                value,
                ring,
                query_start_loc,
                seq_lens,
                slot_mapping,
                num_reqs,
                ring_slots,
                newest,
                head,
                SLOTS_PER_BLOCK,
                D,
                PADDED,
            )
