"""What several Triton kernels share: where vectors lie in a page, request search, the codecs."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsekv.format.codecs import Int2Codec, Int3Codec, Int4Codec
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.format.window import LARGEST

AUTO = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
INT3 = tl.constexpr(3)
INT2 = tl.constexpr(4)
CODEC_IDS = {"auto": 0, "fp8": 1, "int4": 2, "int3": 3, "int2": 4}
"""Integer codecs from INT4 on, of 6 - id bits; two bands are two vectors, see :func:`vectors`."""

_STEPS4 = tl.constexpr(float(Int4Codec.steps))
_STEPS3 = tl.constexpr(float(Int3Codec.steps))
_STEPS2 = tl.constexpr(float(Int2Codec.steps))
_GAIN2 = tl.constexpr(float(Int2Codec.gain))
_LARGEST8 = tl.constexpr(float(LARGEST))

_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: adding, then subtracting it rounds |x| < 2**22 to an integer, ties to even."""


def vectors(fmt: SparseFormat, block_size: int) -> dict[str, tuple[int, ...] | None]:
    """Codec of keys ``K`` and values ``V``, then start and width of bitmaps, values and scales.

    Starts are those of the sections in a page, widths those of one token, all in bytes; last comes
    the number of elements. Keys of two bands are two vectors, ``K`` and ``K2``, else None.
    """
    starts = [0]
    for width in ("bitmap_bytes", "value_bytes", "scale_bytes"):
        for part in (fmt.key, fmt.value):
            starts.append(starts[-1] + block_size * getattr(part, width))
    key, value = (
        (
            *(starts[first], part.bitmap_bytes),
            *(starts[first + 2], part.value_bytes),
            *(starts[first + 4], part.scale_bytes),
            part.head_size,
        )
        for first, part in enumerate((fmt.key, fmt.value))
    )
    value = CODEC_IDS[fmt.value.codec.name], *value
    if fmt.key.codec.bands == 1:
        return {"K": (CODEC_IDS[fmt.key.codec.name], *key), "K2": None, "V": value}
    *bitmaps, values, pitch, scales, scale_pitch, size = key
    first = CODEC_IDS["int4"], *bitmaps, values, pitch, scales, scale_pitch, size // 2
    values, scales = values + size // 4, scales + 2
    second = CODEC_IDS["int2"], *bitmaps, values, pitch, scales, scale_pitch, size // 2
    return {"K": first, "K2": second, "V": value}


@triton.jit
def find_request(query_start_loc, num_reqs, item, ROWS: tl.constexpr):
    """The request that query tile ``item`` belongs to.

    Request r owns the tiles of up to ROWS tokens from ``query_start_loc[r] // ROWS + r`` on, so
    ``num_tokens // ROWS + num_reqs`` tiles are enough and some are empty. ROWS 0 counts tokens.
    """
    low = 0
    high = num_reqs
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start_loc + middle)
        if ROWS > 0:
            first = first // ROWS + middle
        if first <= item:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def encode_fp8(x):
    """float32 -> the bits of float8 e4m3 in int32; saturates, Inf and NaN become NaN."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    sign = (bits >> 24) & 0x80
    small = (tl.minimum(tl.abs(x), 448.0) * 512.0 + _ROUND) - _ROUND
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    normal = tl.minimum((rounded >> 20) - 960, 0x7E)
    finite = tl.where(magnitude < 0x3C800000, small.to(tl.int32), normal) | sign
    code = tl.where(magnitude == 0x7F800000, 0x7F, finite)
    return tl.where(magnitude > 0x7F800000, 0x7F | sign, code)


@triton.jit
def decode_fp8(code):
    """The bits of float8 e4m3 in int32 -> float32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    small = magnitude.to(tl.float32) * 0.001953125
    value = tl.where(magnitude < 8, small, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(code >= 0x80, -value, value)


@triton.jit
def int_scale(x, survives, BITS: tl.constexpr):
    """Step, in the bits of float16, and zero of each row of x (rows, D) float32, both int32."""
    STEPS: tl.constexpr = _STEPS4 if BITS == 4 else _STEPS3 if BITS == 3 else _STEPS2
    UNITS: tl.constexpr = 2 ** (7 - BITS)
    low = tl.minimum(tl.min(tl.where(survives, x, 0.0), axis=1), 0.0)
    high = tl.maximum(tl.max(tl.where(survives, x, 0.0), axis=1), 0.0)
    broken = tl.max((survives & ~(tl.abs(x) < float("inf"))).to(tl.int32), axis=1) > 0
    wide = tl.math.div_rn(high - low, tl.full(low.shape, STEPS, tl.float32)).to(tl.float16)
    step = (wide.to(tl.int16, bitcast=True).to(tl.int32) + 0x20) & 0x7FC0
    step = tl.where(broken | (step >= 0x7C00), 0x7FC0, step)
    middle = UNITS / 2 * (low + high)
    if BITS == 2:
        middle *= _GAIN2
    zero = UNITS * (2**BITS - 1) / 2 - tl.math.div_rn(middle, _float(step))
    zero = tl.where(tl.abs(zero) < float("inf"), zero, 0.0)
    return step, _round(tl.minimum(tl.maximum(zero, 0.0), 127.0))


@triton.jit
def encode_int(x, step, zero, BITS: tl.constexpr):
    """float32 -> codes 0 .. 2**BITS - 1 in int32, NaN to 0."""
    LARGEST: tl.constexpr = 2.0**BITS - 1
    if BITS == 2:
        x *= _GAIN2
    code = tl.math.div_rn(x, tl.broadcast_to(_float(step), x.shape))
    code += zero.to(tl.float32) * (2.0 ** (BITS - 7))
    return _round(tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), LARGEST), 0.0))


@triton.jit
def nearest_int(x, step, zero, BITS: tl.constexpr):
    """What rows x (rows, D) float32 read back as, step and zero as of :func:`int_scale`."""
    code = encode_int(x, step[:, None], zero[:, None], BITS).to(tl.float32)
    wide = _float(step)
    offset = wide * (zero.to(tl.float32) * (2.0 ** (BITS - 7)))
    return wide[:, None] * code - offset[:, None]


@triton.jit
def encode_int8(x):
    """Rows x (n, D) as :func:`vllm_sparsekv.format.window.to_int8`: codes, and the bits of steps.

    Steps (n,) are float32 whose lower half is 0, in int32.
    """
    x = x.to(tl.float32)
    magnitude = tl.abs(x)
    broken = tl.max((~(magnitude < float("inf"))).to(tl.int32), axis=1) > 0
    largest = tl.max(magnitude, axis=1)
    step = tl.math.div_rn(largest, tl.full(largest.shape, _LARGEST8, tl.float32))
    bits = tl.where(broken, 0x7FC00000, step.to(tl.int32, bitcast=True) & -0x10000)
    wide = tl.broadcast_to(bits.to(tl.float32, bitcast=True)[:, None], x.shape)
    code = tl.math.div_rn(x, wide)
    code = tl.where(tl.abs(code) < float("inf"), code, 0.0)
    return _round(tl.minimum(tl.maximum(code, -_LARGEST8), _LARGEST8)).to(tl.int8), bits


@triton.jit
def decode_scale(packed):
    """Step, float32, and zero, int32, of scales, int32, as they are stored."""
    return _float((packed >> 1) & 0x7FC0), packed & 127


@triton.jit
def _float(half_bits):
    return half_bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _round(x):
    return ((x + _ROUND) - _ROUND).to(tl.int32)
