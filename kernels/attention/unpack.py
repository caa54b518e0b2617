"""Unpack a tile of pruned vectors inside a Triton kernel.

:func:`unpack_words` is for NVIDIA GPUs: inline PTX, see :mod:`vllm_sparsekv.kernels.attention.ptx`,
a few instructions an element. :func:`unpack_elements` works everywhere, one element a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.ptx import (
    CODE_SHIFTS,
    constraints,
    decode_constraints,
    decode_word,
    unpack_word,
)
from vllm_sparsekv.kernels.triton import (
    AUTO,
    CODEC_IDS,
    FP8,
    INT2,
    INT3,
    INT4,
    decode_fp8,
    decode_scale,
)

_AUTO = tl.constexpr(unpack_word("auto", True))
_FP8 = tl.constexpr(unpack_word("fp8", True))
_FP8_WIDENED = tl.constexpr(unpack_word("fp8", False))
_INT4 = tl.constexpr(unpack_word("int4", True))
_AUTO_OPERANDS = tl.constexpr(constraints("auto"))
_FP8_OPERANDS = tl.constexpr(constraints("fp8"))
_INT4_OPERANDS = tl.constexpr(constraints("int4"))
_ALL_FP8 = tl.constexpr(decode_word("fp8", True))
_ALL_FP8_WIDENED = tl.constexpr(decode_word("fp8", False))
_ALL_INT4 = tl.constexpr(decode_word("int4", True))
_ALL_INT3 = tl.constexpr(decode_word("int3", True))
_ALL_INT2 = tl.constexpr(decode_word("int2", True))
_ALL_FP8_OPERANDS = tl.constexpr(decode_constraints("fp8"))
_ALL_INT4_OPERANDS = tl.constexpr(decode_constraints("int4"))
_ALL_INT3_OPERANDS = tl.constexpr(decode_constraints("int3"))
_ALL_INT2_OPERANDS = tl.constexpr(decode_constraints("int2"))


def _unit_exponents(codec: str) -> int:
    """By output of ``decode_word``, a nibble each: exponents of 2 that make all codes alike."""
    shifts = CODE_SHIFTS.get(codec, ())
    return sum(max(shifts) - x << 4 * i for i, x in enumerate(shifts))


# By codec id: outputs of ``decode_word``, and their units.
_HALVES = tl.constexpr(tuple(len(CODE_SHIFTS.get(codec, ())) for codec in CODEC_IDS))
_UNIT_EXPONENTS = tl.constexpr(tuple(_unit_exponents(codec) for codec in CODEC_IDS))


@triton.jit
def code_step(CODEC: tl.constexpr):
    """What a step is multiplied with for integer tiles in words.

    They count 16ths of a code, INT3's 128ths, INT2's 64ths, in units of 2**-24.
    """
    return 2.0**20 if CODEC == INT4 else 2.0**17 if CODEC == INT3 else 2.0**18


@triton.jit
def code_zero(CODEC: tl.constexpr):
    """What a scale's zero counts, an 8th of a code, INT3's 16th, INT2's 32nd, in their units."""
    return 2.0**-21 if CODEC == INT3 else 2.0**-23


@triton.jit
def unpack_tile(
    page,
    offset,
    step,
    zero,
    visible,
    VECTORS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Elements from FIRST on of vectors of TILE tokens, as (TILE, WIDTH) DTYPE.

    A vector is ``code_step * step * (tile - code_zero * zero)`` for integers in words, else
    ``tile``; integers in words without a bitmap are in the order of :func:`decoded_query`. What is
    pruned, not visible or beyond the vector is 0, for integers in words zero itself.

    Args:
        page: (TILE,) pointers to uint8 or one for all, the tile of the KV head in a block.
        offset: (TILE,) int32, places of the tokens in their blocks.
        step, zero: of :func:`load_scale`; of other codecs anything.
        visible: (TILE,) bool, the others read as zeros; or None, which makes all visible.
        VECTORS: as of ``vectors`` in :mod:`vllm_sparsekv.kernels.triton`.
        WORDS: the target, to unpack with inline PTX; 0 for :func:`unpack_elements`.
    """
    CONVERTS_FP8: tl.constexpr = WORDS >= 89
    CODEC: tl.constexpr = VECTORS[0]
    BITMAP_BYTES: tl.constexpr = VECTORS[2]
    VALUE_BYTES: tl.constexpr = VECTORS[4]
    D: tl.constexpr = VECTORS[7]
    bitmap_at = page + (VECTORS[1] + offset * BITMAP_BYTES)
    values_at = page + (VECTORS[3] + offset * VALUE_BYTES)
    if WORDS == 0:
        tl.static_assert(FIRST == 0)
        return unpack_elements(
            bitmap_at, values_at, step, zero, visible, D, WIDTH, BITMAP_BYTES, CODEC, DTYPE
        )
    elif BITMAP_BYTES == 0:
        return decode_words(values_at, visible, D, FIRST, WIDTH, CODEC, DTYPE, CONVERTS_FP8)
    else:
        return unpack_words(
            bitmap_at,
            values_at,
            zero,
            visible,
            D,
            FIRST,
            WIDTH,
            VALUE_BYTES,
            CODEC,
            DTYPE,
            CONVERTS_FP8,
        )


@triton.jit
def prefetch(start, SIZE: tl.constexpr):
    """Ask for SIZE bytes in the second-level cache."""
    LINES: tl.constexpr = triton.next_power_of_2((SIZE + 127) // 128)
    line = tl.minimum(tl.arange(0, LINES) * 128, SIZE - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1];\nmov.b32 $0, 0;",
        "=r,l",
        [start.to(tl.int64) + line],
        tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_scale(page, offset, visible, VECTORS: tl.constexpr, WORDS: tl.constexpr):
    """Step, float32, and zero, int32, of TILE tokens; 0 where not visible."""
    scale_at = page + (VECTORS[5] + offset * VECTORS[6])
    if WORDS > 0:
        # Inline, so that whoever needs a scale loads it and none passes it on.
        packed = tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=r,l", [scale_at.to(tl.int64)], tl.int32, True, 1
        )
    else:
        packed = tl.load(scale_at.to(tl.pointer_type(tl.uint16))).to(tl.int32)
    if visible is not None:
        packed = tl.where(visible, packed, 0)
    return decode_scale(packed)


@triton.jit
def log2_step(step):
    """log2 of (TILE,) steps; of 0 a little less than of the smallest there is."""
    positive = tl.maximum(step, 2.0**-19, propagate_nan=tl.PropagateNan.ALL)
    bits = positive.to(tl.int32, bitcast=True)
    result = tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=r,r", [bits], tl.int32, is_pure=True, pack=1
    )
    return result.to(tl.float32, bitcast=True)


@triton.jit
def unpack_words(
    bitmap_at,
    values_at,
    zero,
    visible,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
):
    """As :func:`unpack_tile`. INT4 comes out as :mod:`vllm_sparsekv.kernels.attention.ptx` says.

    Args:
        bitmap_at: (TILE,) pointers to uint8, each token's bitmap.
        values_at: (TILE,) pointers to its packed values; up to 20 bytes before them are read too.
        zero: (TILE,) int32, the code of 0 in eighths, for INT4.
        visible: (TILE,) bool or None.
        D, FIRST: multiples of 32.
        DTYPE: the model dtype for AUTO, float16 otherwise.
        CONVERTS_FP8: the target has an instruction for it.
    """
    words = (bitmap_at + FIRST // 8).to(tl.pointer_type(tl.int32))
    word = _load_rows(words, visible, (D - FIRST) // 32, WIDTH // 32)
    population = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, True, 1)
    end = tl.cumsum(population, axis=1)
    if FIRST > 0:
        # Every vector has as many survivors.
        BITS: tl.constexpr = 4 if CODEC == INT4 else 8 if CODEC == FP8 else 16
        end += (VALUE_BYTES * 8 // BITS - tl.sum(population, axis=1))[:, None]
    address = values_at.to(tl.int64)
    if CODEC == AUTO:
        return _halves(_AUTO, _AUTO_OPERANDS, [word, end, address[:, None]], DTYPE, 16)
    elif CODEC == FP8:
        text: tl.constexpr = _FP8 if CONVERTS_FP8 else _FP8_WIDENED
        return _halves(text, _FP8_OPERANDS, [word, end, address[:, None]], DTYPE, 16)
    else:
        if VALUE_BYTES % 4 != 0:
            # Two bytes of an odd half word are four nibbles of another vector.
            end += ((address & 2) * 2).to(tl.int32)[:, None]
            address &= -4
        fill = (zero * 0x02020202)[:, None]
        operands = [word, end, address[:, None], fill]
        return _halves(_INT4, _INT4_OPERANDS, operands, DTYPE, 16)


@triton.jit
def decode_words(
    values_at,
    visible,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
):
    """As :func:`unpack_words` for vectors that keep all their elements.

    Integers come out in the order of :func:`decoded_query`.
    """
    LEFT: tl.constexpr = D - FIRST
    if CODEC == AUTO:
        return _load_rows(values_at.to(tl.pointer_type(DTYPE)) + FIRST, visible, LEFT, WIDTH)
    elif CODEC == FP8:
        words = values_at.to(tl.pointer_type(tl.int32)) + FIRST // 4
        word = _load_rows(words, visible, LEFT // 4, WIDTH // 4)
        text: tl.constexpr = _ALL_FP8 if CONVERTS_FP8 else _ALL_FP8_WIDENED
        return _halves(text, _ALL_FP8_OPERANDS, [word], DTYPE, 2)
    elif CODEC == INT4:
        words = values_at.to(tl.pointer_type(tl.int32)) + FIRST // 8
        word = _load_rows(words, visible, LEFT // 8, WIDTH // 8)
        return _halves(_ALL_INT4, _ALL_INT4_OPERANDS, [word], DTYPE, 4)
    elif CODEC == INT2:
        words = values_at.to(tl.pointer_type(tl.int32)) + FIRST // 16
        word = _load_rows(words, visible, LEFT // 16, WIDTH // 16)
        return _halves(_ALL_INT2, _ALL_INT2_OPERANDS, [word], DTYPE, 8)
    else:
        words = values_at.to(tl.pointer_type(tl.int32)) + FIRST // 32 * 3
        low = _load_rows(words, visible, LEFT // 32, WIDTH // 32, 3)
        middle = _load_rows(words + 1, visible, LEFT // 32, WIDTH // 32, 3)
        high = _load_rows(words + 2, visible, LEFT // 32, WIDTH // 32, 3)
        return _halves(_ALL_INT3, _ALL_INT3_OPERANDS, [low, middle, high], DTYPE, 16)


@triton.jit
def decoded_query(q, CODEC: tl.constexpr):
    """q (ROWS, PADDED) for a product with integer tiles of :func:`decode_words`.

    Such a tile has of each 2 n elements 0 n 1 n + 1 ..., n = 4 for INT4, 16 for INT3
    and 8 for INT2, codes in
    units that depend on the element; here elements are multiplied so that all count alike.
    """
    ROWS: tl.constexpr = q.shape[0]
    PADDED: tl.constexpr = q.shape[1]
    HALF: tl.constexpr = _HALVES[CODEC]
    alike = (q.to(tl.float32) * _units(PADDED, CODEC)[None, :]).to(q.dtype)
    grouped = tl.reshape(alike, [ROWS, PADDED // (2 * HALF), 2, HALF])
    return tl.reshape(tl.permute(grouped, [0, 1, 3, 2]), [ROWS, PADDED])


@triton.jit
def encoded_order(weighted, CODEC: tl.constexpr):
    """Sums (PADDED, ROWS) over such a tile, their elements in order again and counting alike."""
    PADDED: tl.constexpr = weighted.shape[0]
    ROWS: tl.constexpr = weighted.shape[1]
    HALF: tl.constexpr = _HALVES[CODEC]
    grouped = tl.reshape(weighted, [PADDED // (2 * HALF), HALF, 2, ROWS])
    ordered = tl.reshape(tl.permute(grouped, [0, 2, 1, 3]), [PADDED, ROWS])
    return ordered * _units(PADDED, CODEC)[:, None]


@triton.jit
def _units(PADDED: tl.constexpr, CODEC: tl.constexpr):
    """(PADDED,) float32 powers of two, by element."""
    HALF: tl.constexpr = _HALVES[CODEC]
    EXPONENTS: tl.constexpr = _UNIT_EXPONENTS[CODEC]
    place = (tl.arange(0, PADDED) % HALF * 4).to(tl.int64)
    exponent = (tl.full([PADDED], EXPONENTS, tl.int64) >> place) & 15
    return (1 << exponent).to(tl.float32)


@triton.jit
def _load_rows(row, visible, WIDTH: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr = 1):
    """(TILE, PADDED) from (TILE,) pointers; 0 from WIDTH on and in rows that are not visible."""
    column = tl.arange(0, PADDED)[None, :]
    place = row[:, None] + column * STRIDE
    if PADDED == 2:
        # As if less were aligned: a thread with a whole row would write it by single elements.
        place = tl.multiple_of(place, [4, 4])
    if STRIDE > 1:
        # Not so, but without it Triton 3.6 spreads a warp over 32 rows, for half as many more
        # instructions. No load gets wider: of odd strides it knows an alignment of one word.
        place = tl.max_contiguous(place, [1, 2])
    if visible is not None:
        return tl.load(place, mask=visible[:, None] & (column < WIDTH), other=0)
    elif WIDTH == PADDED:
        return tl.load(place)
    else:
        return tl.load(place, mask=column < WIDTH, other=0)


@triton.jit
def _halves(TEXT: tl.constexpr, OPERANDS: tl.constexpr, arguments, DTYPE: tl.constexpr, COUNT):
    """Run an instruction text on (TILE, n) words; its COUNT results, two DTYPE each, in a row."""
    pairs = tl.inline_asm_elementwise(
        TEXT, OPERANDS, arguments, (tl.int32,) * COUNT, is_pure=True, pack=1
    )
    if COUNT == 16:
        pairs = _join_halves(pairs, 8)
    if COUNT >= 8:
        pairs = _join_halves(pairs, 4)
    if COUNT >= 4:
        pairs = _join_halves(pairs, 2)
    pairs = _join_halves(pairs, 1)[0]
    low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    rows: tl.constexpr = arguments[0].shape[0]
    tile = tl.reshape(tl.join(low, high), [rows, arguments[0].shape[1] * COUNT * 2])
    # A move Triton cannot see through: behind the joins it would guess 8-bit data and pick an
    # operand layout that costs a register move per pair and rules ldmatrix out.
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [tile], tile.dtype, is_pure=False, pack=2
    )


@triton.jit
def _join_halves(x, HALF: tl.constexpr):
    """Join element i with element i + HALF: the new innermost axis is the high bit of the index."""
    joined = (tl.join(x[0], x[HALF]),)
    for i in tl.static_range(1, HALF):
        joined = joined + (tl.join(x[i], x[i + HALF]),)
    return joined


@triton.jit
def unpack_elements(
    bitmap_at,
    values_at,
    step,
    zero,
    visible,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    BITMAP_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Vectors of TILE tokens as (TILE, PADDED) DTYPE, for any D and DTYPE; integers decoded."""
    element = tl.arange(0, PADDED)[None, :]
    kept = tl.broadcast_to(element < D, [values_at.shape[0], PADDED])
    if visible is not None:
        kept &= visible[:, None]
    rank = tl.broadcast_to(element, kept.shape)
    if BITMAP_BYTES > 0:
        byte = tl.load(bitmap_at[:, None] + element // 8, mask=kept, other=0).to(tl.int32)
        bit = (byte >> (element % 8)) & 1
        rank = tl.cumsum(bit, axis=1) - bit
        kept = bit > 0
    if CODEC == AUTO:
        values = values_at.to(tl.pointer_type(DTYPE))
        return tl.load(values[:, None] + rank, mask=kept, other=0)
    elif CODEC == FP8:
        code = tl.load(values_at[:, None] + rank, mask=kept, other=0)
        return decode_fp8(code.to(tl.int32)).to(DTYPE)
    else:
        BITS: tl.constexpr = 6 - CODEC
        first = rank * BITS
        byte = values_at[:, None] + first // 8
        packed = tl.load(byte, mask=kept, other=0).to(tl.int32)
        if CODEC == INT3:
            more = tl.load(byte + 1, mask=kept & (first % 8 > 5), other=0).to(tl.int32)
            packed |= more << 8
        code = ((packed >> (first % 8)) & (2**BITS - 1)).to(tl.float32)
        value = step[:, None] * (code - zero[:, None].to(tl.float32) * (2.0 ** (BITS - 7)))
        return tl.where(kept, value, 0).to(DTYPE)
