"""PTX that unpacks 32 elements at once: one bitmap word of one vector, in registers.

A thread owns one bitmap word and walks it from the top, sixteen elements at a time (eight of 16-bit
values). It loads their packed survivors into a small window of registers, the last survivor at the
very top. Then, a nibble of the bitmap at a time, ``prmt`` drops each survivor in its element's
place, a zero where none is, and a funnel shift moves the window past the survivors used up. Byte
selectors and shifts come from a table of one entry a lane, read by ``shfl``: no memory, no bank
conflicts. Walking down, what is read too much lies before the vector, inside the page, so that no
load needs a bound.

All of this is text for ``tl.inline_asm_elementwise``; operands are 16 outputs of
two neighbouring 16-bit elements each (.b32), then

- the bitmap word (.b32),
- the number of the vector's survivors up to its end (.b32),
- the address of the vector's first survivor, a multiple of 4 (.b64),
- for int4 its zero in sixteenths of a code, a byte, four times over (.b32). What comes out is the
  code in sixteenths, zero itself where an element was pruned, as the smallest float16 numbers
  (n * 2**-24), which multiply exactly: ``value = (out * 2**24 - zero) * step / 16``.

``shfl`` needs all lanes of the warp, which Triton's elementwise code always has.

Vectors that keep all their elements have no bitmap: :func:`decode_word` takes 32 of their bits.
"""

from __future__ import annotations

ELEMENTS = 32
WORD, END, ADDRESS, ZERO = (f"${ELEMENTS // 2 + i}" for i in range(4))
ZERO_BYTE = 4
"""Selects byte 0 of ``prmt``'s second operand, which is zero throughout."""
OVERRUN = 20
"""Bytes read before a vector's first survivor at most."""


def constraints(codec: str) -> str:
    """Operand constraints of :func:`unpack_word`, as LLVM spells them."""
    return ",".join(["=r"] * (ELEMENTS // 2) + ["r", "r", "l"] + ["r"] * (codec == "int4"))


def unpack_word(codec: str, converts_fp8: bool) -> str:
    """The instructions.

    Args:
        codec: name of the codec; ``auto`` stands for 16-bit values.
        converts_fp8: the target converts float8 e4m3 in hardware (compute capability 8.9 or more).
    """
    declarations = [
        ".reg .b32 lane, index, table, low, high, shift, zero, at, entry, four;",
        ".reg .b32 upper, pair, code, scale;",
        ".reg .b32 loaded<5>, window<4>;",
        ".reg .b64 address;",
        ".reg .b16 half<2>;",
        "mov.b32 zero, 0;",
        "mov.u32 lane, %laneid;",
    ]
    if codec == "auto":
        unpack = _unpack_16bit()
    elif codec == "fp8":
        unpack = _unpack_fp8(converts_fp8)
    else:
        unpack = _unpack_int4()
    return "\n".join(["{", *declarations, *unpack, "}"])


def decode_constraints(codec: str) -> str:
    """Operand constraints of :func:`decode_word`."""
    outputs, words = {"fp8": (2, 1), "int4": (4, 1), "int3": (16, 3), "int2": (8, 1)}[codec]
    return ",".join(["=r"] * outputs + ["r"] * words)


def decode_word(codec: str, converts_fp8: bool) -> str:
    """32 bits of packed elements, 96 of int3, to as many 16-bit elements, two an output.

    Inputs (.b32) are the words, after 2 outputs for fp8, 4 for int4, 8 for int2 and 16 for int3.
    fp8 keeps the order of elements. Output i of the integer codecs is elements i and i + n, n the
    number of outputs, each as the float16 ``(code << shift) * 2**-24`` with shift
    ``CODE_SHIFTS[codec][i]``.
    """
    lines = [
        ".reg .b32 four, zero, pair, code, scale;",
        ".reg .b32 word<6>;",
        ".reg .b16 half<2>;",
        "mov.b32 zero, 0;",
    ]
    if codec == "fp8":
        lines += ["mov.b32 four, $2;", *_float16_of_fp8(0, converts_fp8)]
    elif codec in ("int4", "int2"):
        shifts = CODE_SHIFTS[codec]
        word, mask = f"${len(shifts)}", 0x000F000F if codec == "int4" else 0x00030003
        lines.append(f"shr.u32 four, {word}, 8;")
        for out, shift in enumerate(shifts):
            source = word if 2 * out < len(shifts) else "four"
            lines.append(f"and.b32 ${out}, {source}, {mask << shift:#x};")
    else:
        lines += _decode_int3()
    return "\n".join(["{", *lines, "}"])


CODE_SHIFTS = {"int4": (0, 4) * 2, "int2": (0, 2, 4, 6) * 2, "int3": (0, 3, 6, 1, 4, 7, 2, 5) * 2}
"""Where the codes of an output of :func:`decode_word` lie in its halves."""


def _decode_int3() -> list[str]:
    """A window begins at every byte: its codes are within ten bits of both streams' half words."""
    windows = {
        "word0": "$16, $17, 0x7610",
        "word2": "$16, $18, 0x5432",
        "word4": "$17, $18, 0x7610",
        "word1": "word0, word2, 0x6341",
        "word3": "word2, word4, 0x6341",
        "word5": "word4, zero, 0x4341",
    }
    lines = [f"prmt.b32 {word}, {operands};" for word, operands in windows.items()]
    for out, shift in enumerate(CODE_SHIFTS["int3"]):
        lines.append(f"and.b32 ${out}, word{3 * out // 8}, {0x00070007 << shift:#x};")
    return lines


def _nibble_selector(nibble: int) -> int:
    """Selector of the bytes of four elements out of a register that ends in their survivors."""
    selector, place = 0, 4 - nibble.bit_count()
    for bit in range(4):
        kept = nibble >> bit & 1
        selector |= (place if kept else ZERO_BYTE) << 4 * bit
        place += kept
    return selector


def _pair_selector(pair: int) -> int:
    """Selector of the bytes of two 16-bit elements, likewise."""
    selector, place = 0, 4 - 2 * pair.bit_count()
    for bit in range(2):
        kept = pair >> bit & 1
        selector |= (place | place + 1 << 4 if kept else ZERO_BYTE * 0x11) << 8 * bit
        place += 2 * kept
    return selector


def _bytes(values: list[int]) -> list[str]:
    """Bytes four to a register, as hexadecimal immediates."""
    words = [values[i : i + 4] for i in range(0, len(values), 4)]
    return [f"0x{int.from_bytes(bytes(word), 'little'):08x}" for word in words]


def _nibble_table() -> list[str]:
    """table = selector | 8 * survivors << 16 of the nibble ``lane & 15``.

    Two look-ups by its upper three bits; bit 0 only turns the first element's zero off, as any
    digit from ZERO_BYTE on selects a zero.
    """
    low = _bytes([_nibble_selector(2 * n + 1) & 0xFF for n in range(8)])
    high = _bytes([_nibble_selector(2 * n + 1) >> 8 for n in range(8)])
    return [
        "shr.u32 index, lane, 1;",
        "and.b32 index, index, 7;",
        f"mov.b32 low, {low[0]};",
        f"mov.b32 table, {low[1]};",
        "prmt.b32 low, low, table, index;",
        f"mov.b32 high, {high[0]};",
        f"mov.b32 table, {high[1]};",
        "prmt.b32 high, high, table, index;",
        "not.b32 shift, lane;",
        "and.b32 shift, shift, 1;",
        "shl.b32 shift, shift, 2;",
        "or.b32 low, low, shift;",
        "prmt.b32 table, low, high, 0x0040;",
        "and.b32 index, lane, 15;",
        "popc.b32 index, index;",
        "shl.b32 index, index, 3;",
        "prmt.b32 table, table, index, 0x7410;",
    ]


def _pair_table() -> list[str]:
    """table = selector | 16 * survivors << 16 of the pair ``lane & 3``, upper of the bits above."""
    low = _bytes([_pair_selector(n) & 0xFF for n in range(4)])[0]
    high = _bytes([_pair_selector(n) >> 8 for n in range(4)])[0]
    shifts = _bytes([16 * n.bit_count() for n in range(4)])[0]
    return [
        "and.b32 index, lane, 3;",
        f"mov.b32 low, {low};",
        "prmt.b32 low, low, zero, index;",
        f"mov.b32 high, {high};",
        "prmt.b32 high, high, zero, index;",
        f"mov.b32 shift, {shifts};",
        "prmt.b32 shift, shift, zero, index;",
        "prmt.b32 table, low, high, 0x0040;",
        "and.b32 shift, shift, 0xff;",
        "prmt.b32 table, table, shift, 0x7410;",
        "shr.u32 index, lane, 2;",
        "shfl.sync.idx.b32 upper, table, index, 31, 0xffffffff;",
    ]


def _window(first: int, elements: int, value_bits: int) -> list[str]:
    """The survivors of the bits from ``first`` on, the last one at the top of ``window0``."""
    words, per_word = elements * value_bits // 32, 32 // value_bits
    above = 2**ELEMENTS - 2 ** (first + elements)
    if above:
        passed = [f"and.b32 at, {WORD}, {above:#x};", "popc.b32 at, at;"]
    else:
        passed = ["mov.b32 at, 0;"]
    lines = [
        *passed,
        f"sub.s32 at, {END}, at;",
        "sub.s32 at, at, 1;",
        f"mad.lo.s32 shift, at, {-value_bits}, {-value_bits};",
        f"shr.s32 at, at, {per_word.bit_length() - 1};",
        f"mad.wide.s32 address, at, 4, {ADDRESS};",
    ]
    lines += [f"ld.global.nc.b32 loaded{i}, [address+{-4 * i}];" for i in range(words + 1)]
    return lines + [
        f"shf.l.wrap.b32 window{i}, loaded{i + 1}, loaded{i}, shift;" for i in range(words)
    ]


def _take(left: int, *select: str, look_up: str = "table") -> list[str]:
    """Drop the survivors of the next bits in place and pass them.

    Args:
        left: window registers still needed afterwards.
        look_up: the table that ``index`` chooses from.
    """
    shift = ["shr.u32 shift, entry, 16;"] if left else []
    return [
        f"shfl.sync.idx.b32 entry, {look_up}, index, 31, 0xffffffff;",
        *select,
        *shift,
        *(f"shf.l.clamp.b32 window{i}, window{i + 1}, window{i}, shift;" for i in range(left)),
    ]


def _index(bit: int) -> str:
    """The next look-ups are for the nibble from ``bit`` on."""
    return f"shr.u32 index, {WORD}, {bit};"


def _unpack_fp8(converts: bool) -> list[str]:
    lines = _nibble_table()
    for first in (16, 0):
        lines += _window(first, 16, 8)
        for nibble in (3, 2, 1, 0):
            out = first + 4 * nibble
            select = "prmt.b32 four, window0, zero, entry;"
            lines += [_index(out), *_take(nibble, select, *_float16_of_fp8(out, converts))]
    return lines


def _float16_of_fp8(out: int, converts: bool) -> list[str]:
    """The e4m3 bytes of ``four`` to outputs from ``out`` on."""
    return _convert_fp8(out) if converts else _widen_fp8(out)


def _convert_fp8(out: int) -> list[str]:
    lines = ["mov.b32 {half0, half1}, four;"]
    for i in range(2):
        lines.append(f"cvt.rn.f16x2.e4m3x2 {_pair(out + 2 * i)}, half{i};")
    return lines


def _widen_fp8(out: int) -> list[str]:
    """By hand: exponent and mantissa move under float16's, which costs a factor of 2**-8.

    NaN, which only a NaN in the model can have stored, reads as 480.
    """
    lines = ["mov.b32 scale, 0x5c005c00;"]
    for i, selector in enumerate(("0x1404", "0x3424")):
        lines += [
            f"prmt.b32 pair, four, zero, {selector};",
            "shr.u32 code, pair, 1;",
            "and.b32 code, code, 0x3f803f80;",
            "and.b32 pair, pair, 0x80008000;",
            "or.b32 pair, pair, code;",
            f"mul.rn.f16x2 {_pair(out + 2 * i)}, pair, scale;",
        ]
    return lines


def _unpack_16bit() -> list[str]:
    lines = _pair_table()
    for first in range(ELEMENTS - 8, -1, -8):
        lines += _window(first, 8, 16)
        for pair in (3, 2, 1, 0):
            out = first + 2 * pair
            select = f"prmt.b32 {_pair(out)}, window0, zero, entry;"
            if pair % 2:
                lines.append(_index(out - 2))
            lines += _take(pair, select, look_up="upper" if pair % 2 else "table")
    return lines


def _unpack_int4() -> list[str]:
    lines = _nibble_table()
    for first in (16, 0):
        lines += _window(first, 16, 4) + _spread_nibbles()
        for nibble in (3, 2, 1, 0):
            out = first + 4 * nibble
            store = []
            for i, selector in enumerate(("0x4140", "0x4342")):
                store.append(f"prmt.b32 {_pair(out + 2 * i)}, four, zero, {selector};")
            select = f"prmt.b32 four, window0, {ZERO}, entry;"
            lines += [_index(out), *_take(nibble, select, *store)]
    return lines


def _spread_nibbles() -> list[str]:
    """Sixteen nibbles in two registers to sixteen bytes ``code << 4`` in four."""
    lines = []
    for i in (1, 0):
        lines += [
            f"shl.b32 low, window{i}, 4;",
            "and.b32 low, low, 0xf0f0f0f0;",
            f"and.b32 high, window{i}, 0xf0f0f0f0;",
            f"prmt.b32 window{2 * i}, low, high, 0x7362;",
            f"prmt.b32 window{2 * i + 1}, low, high, 0x5140;",
        ]
    return lines


def _pair(element: int) -> str:
    """The output that holds ``element`` and the next one."""
    return f"${element // 2}"
