"""Prune and pack in Triton: threshold bisection on the bits of |x|, no sort, codec fused.

The k-th largest magnitude of a vector is built bit by bit from the top: a bit stays set when at
least k magnitudes reach the candidate. Everything above the threshold survives, of those equal to
it the first ones, as many as are missing.

With feedback (:mod:`vllm_sparsekv.format.feedback`) a block of elements is rounded, its errors are
multiplied with their rows of the matrix, and the next block follows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.feedback import block_length
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.triton import (
    AUTO,
    FP8,
    encode_fp8,
    encode_int,
    int_scale,
    nearest_int,
    vectors,
)

ROWS = 16
"""Vectors of one program."""


def pack(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    fmt: SparseFormat,
    *,
    key_feedback: torch.Tensor | None = None,
    value_feedback: torch.Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.pack.reference.pack`, but for sums of feedback."""
    num_tokens = min(key.shape[0], slot_mapping.shape[0])
    if num_tokens == 0:
        return
    _pack[triton.cdiv(num_tokens, ROWS), key.shape[1], 2](
        key.contiguous(),
        value.contiguous(),
        slot_mapping,
        pages,
        None if key_feedback is None else key_feedback.contiguous(),
        None if value_feedback is None else value_feedback.contiguous(),
        num_tokens,
        key.shape[1],
        pages.stride(0),
        pages.stride(1),
        **pack_constants(fmt, pages.shape[2]),
        num_warps=num_warps(fmt.head_size),
    )


def num_warps(head_size: int) -> int:
    """Of a program over ROWS vectors, so that they and a part of a matrix fit registers."""
    return 8 if head_size > 128 else 4


def pack_constants(fmt: SparseFormat, block_size: int) -> dict[str, Any]:
    """Compile-time constants of the pack kernel."""
    return {
        "BLOCK_SIZE": block_size,
        "D": fmt.head_size,
        "BITS": fmt.dtype.itemsize * 8,
        "ROWS": ROWS,
        "LENGTH": block_length(fmt.head_size),
        "K_SURVIVORS": fmt.key.survivors,
        "V_SURVIVORS": fmt.value.survivors,
        **vectors(fmt, block_size),
    }


@triton.jit(do_not_specialize=["num_tokens"])
def _pack(
    key,
    value,
    slot_mapping,
    pages,
    key_feedback,
    value_feedback,
    num_tokens,
    num_heads,
    block_stride,
    head_stride,
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
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    tile = slot // BLOCK_SIZE * block_stride + head * head_stride
    page = pages + tl.where(slot >= 0, tile, 0)
    offset = (slot % BLOCK_SIZE).to(tl.int32)
    source = ((token.to(tl.int64) * num_heads + head) * D)[:, None]
    real = slot >= 0
    corner = head * D * D
    if tl.program_id(2) == 0:
        first = _load(key + source, real, K[7])
        second = None
        if K2 is not None:
            second = _load(key + source + K[7], real, K2[7])
        pack_vectors(
            first,
            second,
            real,
            page,
            offset,
            key_feedback,
            corner,
            K,
            K2,
            BITS,
            K_SURVIVORS,
            LENGTH,
            D,
        )
    else:
        whole = _load(value + source, real, V[7])
        pack_vectors(
            whole,
            None,
            real,
            page,
            offset,
            value_feedback,
            corner,
            V,
            None,
            BITS,
            V_SURVIVORS,
            LENGTH,
            D,
        )


@triton.jit
def _load(source, real, D: tl.constexpr):
    """(ROWS, D) of pointers to their first elements (ROWS, 1), padded by zeros."""
    element = tl.arange(0, triton.next_power_of_2(D))[None, :]
    return tl.load(source + element, mask=real[:, None] & (element < D), other=0)


@triton.jit
def pack_vectors(
    x,
    x2,
    real,
    page,
    offset,
    feedback,
    corner,
    VECTORS: tl.constexpr,
    VECTORS2: tl.constexpr,
    BITS: tl.constexpr,
    SURVIVORS: tl.constexpr,
    LENGTH: tl.constexpr,
    D: tl.constexpr,
):
    """Prune and store vectors x (ROWS, D), or bands x and x2 of some; the rest as `_pack_rows`."""
    missing = _pack_rows(
        x,
        real,
        page,
        offset,
        feedback,
        corner,
        None,
        VECTORS,
        BITS,
        SURVIVORS,
        LENGTH,
        D,
    )
    if VECTORS2 is not None:
        _pack_rows(
            x2,
            real,
            page,
            offset,
            feedback,
            corner + VECTORS[7] * (D + 1),
            missing,
            VECTORS2,
            BITS,
            SURVIVORS,
            LENGTH,
            D,
        )


@triton.jit
def _pack_rows(
    x,
    real,
    page,
    offset,
    feedback,
    corner,
    before,
    VECTORS: tl.constexpr,
    BITS: tl.constexpr,
    SURVIVORS: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Prune and store vectors, which may be a run of elements of longer ones.

    Args:
        x: (ROWS, PADDED) model dtype, 0 beyond the vectors' elements.
        real: (ROWS,) bool, the others are not stored.
        page: (ROWS,) pointers to uint8, the tile of the KV head in a block.
        offset: (ROWS,) int32, places of the tokens in their blocks.
        feedback: pointer to the matrices, or None.
        corner: where in them row and column of the first element meet.
        before: (ROWS, n) float32, what is missing of the run before, or None.
        VECTORS: as of :func:`vectors`.
        SURVIVORS: elements kept, of vectors with a bitmap; all are kept of others.
        LENGTH: elements that are rounded together with feedback.
        STRIDE: elements of a row of the matrix.

    Returns:
        (ROWS, D) float32, what the stored integers are missing, with feedback.
    """
    CODEC: tl.constexpr = VECTORS[0]
    BITMAP_BYTES: tl.constexpr = VECTORS[2]
    D: tl.constexpr = VECTORS[7]
    PADDED: tl.constexpr = triton.next_power_of_2(D)
    values = page + (VECTORS[3] + offset * VECTORS[4])
    element = tl.arange(0, PADDED)[None, :]
    ROWS: tl.constexpr = x.shape[0]
    wide = x.to(tl.float32)
    missing = tl.zeros_like(wide)
    x = tl.where(wide == wide, x, float("nan"))  # one NaN
    integer: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    bits = x.to(integer, bitcast=True)
    magnitude = bits.to(tl.int32) & ((1 << (BITS - 1)) - 1)
    bits = tl.where(magnitude == 0, 0, bits).to(integer)
    magnitude = tl.where(element < D, magnitude, -1)
    if BITMAP_BYTES == 0:
        survives = magnitude >= 0
        rank = tl.broadcast_to(element, magnitude.shape)
    else:
        survives = _survivors(magnitude, BITS, SURVIVORS)
        rank = tl.cumsum(survives.to(tl.int32), axis=1) - 1
        byte = tl.arange(0, PADDED // 8)[None, :]
        in_byte = survives.to(tl.int32).reshape(survives.shape[0], PADDED // 8, 8)
        bitmap = tl.sum(in_byte << tl.arange(0, 8)[None, None, :], axis=2)
        bitmaps = page + (VECTORS[1] + offset * BITMAP_BYTES)
        tl.store(bitmaps[:, None] + byte, bitmap.to(tl.uint8), mask=real[:, None] & (byte < D // 8))

    stored = survives & real[:, None]
    if CODEC == AUTO:
        tl.store(values.to(tl.pointer_type(integer))[:, None] + rank, bits, mask=stored)
    elif CODEC == FP8:
        code = encode_fp8(x.to(tl.float32) + 0.0)
        tl.store(values[:, None] + rank, code.to(tl.uint8), mask=stored)
    else:
        x = tl.where(magnitude == 0, 0.0, x.to(tl.float32))
        CODE_BITS: tl.constexpr = 6 - CODEC
        step, zero = int_scale(x, survives, CODE_BITS)
        target = x
        if feedback is not None:
            matrix = feedback + corner
            # A dot takes 16 rows or more; those of other blocks meet zeros.
            GROUP: tl.constexpr = max(LENGTH, 16)
            if before is not None:
                target = _take_in(target, before, matrix - D * STRIDE, D, D, STRIDE)
            for start in tl.static_range(0, D, LENGTH):
                here = (element >= start) & (element < start + LENGTH)
                error = tl.where(here, x - nearest_int(target, step, zero, CODE_BITS), 0.0)
                missing += error
                if start + LENGTH < D:
                    group = tl.sum(error.reshape(ROWS, PADDED // GROUP, GROUP), axis=1)
                    rows = matrix + start // GROUP * GROUP * STRIDE
                    target = _take_in(target, group, rows, D - start // GROUP * GROUP, D, STRIDE)
        code = encode_int(target, step[:, None], zero[:, None], CODE_BITS)
        if BITMAP_BYTES == 0:
            _store_all(values, code, real, D, PADDED, CODE_BITS)
        else:
            _store_nibbles(values, code, survives, rank, real, SURVIVORS)
        scale = (step << 1 | zero).to(tl.uint16)
        scales = page + (VECTORS[5] + offset * VECTORS[6])
        tl.store(scales.to(tl.pointer_type(tl.uint16)), scale, mask=real)
    return missing


@triton.jit
def _take_in(
    target, missing, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr
):
    """Targets (ROWS, n) and what of earlier elements, (ROWS, m), the feedback adds to them.

    Args:
        rows: pointer into the matrix, at the row of the first of ``missing`` and the column of the
            first target; HEIGHT rows and WIDTH columns from there on are theirs.
    """
    row = tl.arange(0, missing.shape[1])[:, None]
    column = tl.arange(0, target.shape[1])[None, :]
    part = tl.load(rows + row * STRIDE + column, mask=(row < HEIGHT) & (column < WIDTH), other=0)
    return target + tl.dot(missing, part.to(tl.float32), input_precision="ieee")


@triton.jit
def _survivors(magnitude, BITS: tl.constexpr, SURVIVORS: tl.constexpr):
    """The SURVIVORS largest of each row, ties to the lower index."""
    threshold = tl.zeros([magnitude.shape[0]], tl.int32)
    for i in tl.static_range(BITS - 1):
        candidate = threshold | (1 << (BITS - 2 - i))
        reached = tl.sum((magnitude >= candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(reached >= SURVIVORS, candidate, threshold)
    above = magnitude > threshold[:, None]
    tie = (magnitude == threshold[:, None]).to(tl.int32)
    missing = SURVIVORS - tl.sum(above.to(tl.int32), axis=1)
    return above | ((tie > 0) & (tl.cumsum(tie, axis=1) <= missing[:, None]))


@triton.jit
def _store_nibbles(values, code, survives, rank, real, SURVIVORS: tl.constexpr):
    """Survivor 2i is the low nibble of byte i; eight nibbles at a time meet in one sum."""
    half = values.to(tl.pointer_type(tl.int16))
    for start in tl.static_range(0, SURVIVORS, 8):
        here = survives & (rank // 8 == start // 8)
        word = tl.sum(tl.where(here, code << (rank % 8 * 4), 0), axis=1)
        tl.store(half + start // 4, word.to(tl.int16), mask=real)
        if start + 4 < SURVIVORS:
            tl.store(half + start // 4 + 1, (word >> 16).to(tl.int16), mask=real)


@triton.jit
def _store_all(values, code, real, D: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr):
    """Sixteen codes are BITS half words of the stream."""
    GROUPS: tl.constexpr = PADDED // 16
    shift = (tl.arange(0, 16) * BITS).to(tl.int64)[None, None, :]
    stream = tl.sum(code.reshape(code.shape[0], GROUPS, 16).to(tl.int64) << shift, axis=2)
    group = tl.arange(0, GROUPS)[None, :]
    half = values.to(tl.pointer_type(tl.int16))[:, None] + group * BITS
    for i in tl.static_range(BITS):
        word = (stream >> (16 * i)).to(tl.int16)
        tl.store(half + i, word, mask=real[:, None] & (group < D // 16))
