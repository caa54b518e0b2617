"""Unpack a tile of pruned vectors inside a Triton kernel.

:func:`unpack_words` is for NVIDIA GPUs: inline PTX, see :mod:`vllm_sparsekv.kernels.attention.ptx`,
a few instructions an element. :func:`unpack_elements` works everywhere, one element a lane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsekv.kernels.attention.ptx import constraints, unpack_word
from vllm_sparsekv.kernels.triton import AUTO, FP8, INT4, decode_fp8, load_int4_scale

INT4_STEP = tl.constexpr(2.0**20)
INT4_ZERO = tl.constexpr(2.0**-23)
"""Tiles of INT4 count sixteenths of a code in units of 2**-24, zeros are eighths."""

_AUTO_OPERANDS = tl.constexpr(constraints("auto"))
_FP8_OPERANDS = tl.constexpr(constraints("fp8"))
_INT4_OPERANDS = tl.constexpr(constraints("int4"))
_AUTO = tl.constexpr(unpack_word("auto", False, True))
_AUTO_BOUNDED = tl.constexpr(unpack_word("auto", True, True))
_FP8 = tl.constexpr(unpack_word("fp8", False, True))
_FP8_BOUNDED = tl.constexpr(unpack_word("fp8", True, True))
_FP8_WIDENED = tl.constexpr(unpack_word("fp8", False, False))
_FP8_WIDENED_BOUNDED = tl.constexpr(unpack_word("fp8", True, False))
_INT4 = tl.constexpr(unpack_word("int4", False, True))


@triton.jit
def unpack_tile(
    bitmap_at,
    values_at,
    scale_at,
    visible,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    WORDS: tl.constexpr,
    BOUNDED: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
):
    """Vectors of TILE tokens: tile (TILE, PADDED) DTYPE, step (TILE,) float32, zero (TILE,) int32.

    A vector is ``INT4_STEP * step * (tile - INT4_ZERO * zero)`` for INT4 in words, else ``tile``.

    Args:
        bitmap_at: (TILE,) pointers to uint8, each token's bitmap.
        values_at: (TILE,) pointers to its packed values.
        scale_at: (TILE,) pointers to its scale.
        visible: (TILE,) bool, the others read as zeros; or None, which makes all visible.
        WORDS: unpack with :func:`unpack_words`, otherwise with :func:`unpack_elements`.
    """
    step = tl.full([bitmap_at.shape[0]], 1.0, tl.float32)
    zero = tl.zeros([bitmap_at.shape[0]], tl.int32)
    if CODEC == INT4:
        step, zero = load_int4_scale(scale_at, visible)
    if WORDS:
        tile = unpack_words(
            bitmap_at,
            values_at,
            zero,
            visible,
            D,
            PADDED,
            CODEC,
            DTYPE,
            BOUNDED,
            CONVERTS_FP8,
        )
    else:
        tile = unpack_elements(bitmap_at, values_at, step, zero, visible, D, PADDED, CODEC, DTYPE)
    return tile, step, zero


@triton.jit
def unpack_words(
    bitmap_at,
    values_at,
    zero,
    visible,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    BOUNDED: tl.constexpr,
    CONVERTS_FP8: tl.constexpr,
):
    """Vectors of TILE tokens as (TILE, PADDED) DTYPE; 0 where pruned, invisible or beyond D.

    INT4 comes out as :mod:`vllm_sparsekv.kernels.attention.ptx` says.

    Args:
        bitmap_at: (TILE,) pointers to uint8, each token's bitmap.
        values_at: (TILE,) pointers to its packed values.
        zero: (TILE,) int32, the code of 0 in eighths, for INT4.
        visible: (TILE,) bool or None.
        D: a multiple of 32.
        DTYPE: the model dtype for AUTO, float16 otherwise.
        BOUNDED: never read past the last survivor; otherwise, and with INT4, up to 20 bytes on.
        CONVERTS_FP8: the target has an instruction for it.
    """
    WORDS: tl.constexpr = PADDED // 32
    word_index = tl.arange(0, WORDS)[None, :]
    words = bitmap_at.to(tl.pointer_type(tl.int32))[:, None] + word_index
    if visible is None and D == PADDED:
        word = tl.load(words)
    elif visible is None:
        word = tl.load(words, mask=word_index < D // 32, other=0)
    else:
        word = tl.load(words, mask=visible[:, None] & (word_index < D // 32), other=0)
    population = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], tl.int32, True, 1)
    before = tl.cumsum(population, axis=1) - population
    address = values_at.to(tl.int64)
    if CODEC == AUTO:
        halves = _run(
            _AUTO_BOUNDED if BOUNDED else _AUTO,
            _AUTO_OPERANDS,
            [word, before, address[:, None]],
            DTYPE,
        )
    elif CODEC == FP8:
        if CONVERTS_FP8:
            text: tl.constexpr = _FP8_BOUNDED if BOUNDED else _FP8
        else:
            text: tl.constexpr = _FP8_WIDENED_BOUNDED if BOUNDED else _FP8_WIDENED
        halves = _run(text, _FP8_OPERANDS, [word, before, address[:, None]], DTYPE)
    else:
        # Two bytes of an odd half word are four nibbles of another vector.
        before += ((address & 2) * 2).to(tl.int32)[:, None]
        fill = (zero * 0x02020202)[:, None]
        halves = _run(_INT4, _INT4_OPERANDS, [word, before, (address & -4)[:, None], fill], DTYPE)
    halves = _join_halves(halves, 16)
    halves = _join_halves(halves, 8)
    halves = _join_halves(halves, 4)
    halves = _join_halves(halves, 2)
    halves = _join_halves(halves, 1)
    return tl.reshape(halves[0], [word.shape[0], PADDED])


@triton.jit
def _run(TEXT: tl.constexpr, OPERANDS: tl.constexpr, arguments, DTYPE: tl.constexpr):
    if tl.bfloat16 == DTYPE:
        return tl.inline_asm_elementwise(
            TEXT, OPERANDS, arguments, (tl.bfloat16,) * 32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            TEXT, OPERANDS, arguments, (tl.float16,) * 32, is_pure=True, pack=1
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
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Vectors of TILE tokens as (TILE, PADDED) DTYPE, for any D and DTYPE; INT4 all decoded."""
    element = tl.arange(0, PADDED)[None, :]
    real = element < D
    if visible is not None:
        real &= visible[:, None]
    byte = tl.load(bitmap_at[:, None] + element // 8, mask=real, other=0).to(tl.int32)
    kept = (byte >> (element % 8)) & 1
    rank = tl.cumsum(kept, axis=1) - kept
    kept = kept > 0
    if CODEC == AUTO:
        values = values_at.to(tl.pointer_type(DTYPE))
        return tl.load(values[:, None] + rank, mask=kept, other=0)
    elif CODEC == FP8:
        code = tl.load(values_at[:, None] + rank, mask=kept, other=0)
        return decode_fp8(code.to(tl.int32)).to(DTYPE)
    else:
        packed = tl.load(values_at[:, None] + rank // 2, mask=kept, other=0)
        code = (packed.to(tl.int32) >> (rank % 2 * 4)) & 15
        value = step[:, None] * (code.to(tl.float32) - zero[:, None].to(tl.float32) * 0.125)
        return tl.where(kept, value, 0).to(DTYPE)
