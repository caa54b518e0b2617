"""PTX that unpacks 32 elements at once: one bitmap word of one vector, in registers.

A thread owns one bitmap word. It loads the packed survivors of eight or sixteen elements into a
small window of registers, aligned to the first survivor. Then, a nibble of the bitmap (a pair of
bits for 16-bit survivors) at a time, ``prmt`` drops each survivor in its element's place, a zero
where none is, and a funnel shift moves the window past the survivors used up. The byte selector and
the shift of a nibble come from a table of one entry a lane, read by ``shfl``: no memory, no bank
conflicts.

All of this is text for ``tl.inline_asm_elementwise``; operands are 32 16-bit outputs, then

- the bitmap word (.b32),
- the number of the vector's survivors before it (.b32),
- the address of the vector's first survivor, a multiple of 4 (.b64),
- for int4 its zero in sixteenths of a code, a byte, four times over (.b32). What comes out is the
  code in sixteenths, zero itself where an element was pruned, as the smallest float16 numbers
  (n * 2**-24), which multiply exactly: ``value = (out * 2**24 - zero) * step / 16``.

``shfl`` needs all lanes of the warp, which Triton's elementwise code always has.
"""

from __future__ import annotations

ELEMENTS = 32
WORD, BEFORE, ADDRESS, ZERO = (f"${ELEMENTS + i}" for i in range(4))
ZERO_BYTE = 4
"""Selects byte 0 of ``prmt``'s second operand, which is zero throughout."""


def constraints(codec: str) -> str:
    """Operand constraints, as LLVM spells them."""
    return ",".join(["=h"] * ELEMENTS + ["r", "r", "l"] + ["r"] * (codec == "int4"))


def unpack_word(codec: str, bounded: bool, converts_fp8: bool) -> str:
    """The instructions.

    Args:
        codec: name of the codec; ``auto`` stands for 16-bit values.
        bounded: never read past the word's last survivor; otherwise up to 20 bytes past it.
        converts_fp8: the target converts float8 e4m3 in hardware (compute capability 8.9 or more).
    """
    unpack = {"auto": _unpack_16bit, "fp8": _unpack_fp8, "int4": _unpack_int4}[codec]
    declarations = [
        ".reg .b32 lane, index, table, low, high, shift, zero, bits, rank, at, entry, four;",
        ".reg .b32 needed, pair, code, scale;",
        ".reg .b32 loaded<5>, window<4>;",
        ".reg .b64 address;",
        ".reg .b16 half<2>;",
        ".reg .pred more;",
        "mov.b32 zero, 0;",
        "mov.u32 lane, %laneid;",
    ]
    return "\n".join(["{", *declarations, *unpack(bounded, converts_fp8), "}"])


def _nibble_selector(nibble: int) -> int:
    """Selector of the bytes of four elements out of the next four survivors."""
    selector, rank = 0, 0
    for bit in range(4):
        kept = nibble >> bit & 1
        selector |= (rank if kept else ZERO_BYTE) << 4 * bit
        rank += kept
    return selector


def _pair_selector(pair: int) -> int:
    """Selector of the bytes of two 16-bit elements out of the next two survivors."""
    selector, rank = 0, 0
    for bit in range(2):
        kept = pair >> bit & 1
        place = 2 * rank | (2 * rank + 1) << 4
        selector |= (place if kept else ZERO_BYTE * 0x11) << 8 * bit
        rank += kept
    return selector


def _bytes(values: list[int]) -> list[str]:
    """Bytes four to a register, as hexadecimal immediates."""
    words = [values[i : i + 4] for i in range(0, len(values), 4)]
    return [f"0x{int.from_bytes(bytes(word), 'little'):08x}" for word in words]


def _nibble_table() -> list[str]:
    """table = selector | 8 * survivors << 16 of the nibble ``lane & 15``.

    Two look-ups by its lower three bits; bit 3 only turns the last element's zero off, as any digit
    from ZERO_BYTE on selects a zero.
    """
    low = _bytes([_nibble_selector(n) & 0xFF for n in range(8)])
    high = _bytes([_nibble_selector(n | 8) >> 8 for n in range(8)])
    return [
        "and.b32 index, lane, 7;",
        f"mov.b32 low, {low[0]};",
        "prmt.b32 low, low, low, index;",
        f"mov.b32 high, {high[0]};",
        f"mov.b32 table, {high[1]};",
        "prmt.b32 high, high, table, index;",
        "not.b32 shift, lane;",
        "and.b32 shift, shift, 8;",
        "shl.b32 shift, shift, 3;",
        "or.b32 high, high, shift;",
        "prmt.b32 table, low, high, 0x0040;",
        "and.b32 index, lane, 15;",
        "popc.b32 index, index;",
        "shl.b32 index, index, 3;",
        "prmt.b32 table, table, index, 0x7410;",
    ]


def _pair_table() -> list[str]:
    """table = selector | 16 * survivors << 16 of the pair ``lane & 3``."""
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
    ]


def _window(first: int, elements: int, value_bits: int, bounded: bool) -> list[str]:
    """Bring the survivors of ``elements`` bits from ``first`` on to the start of the window.

    Leaves those bits at the bottom of ``bits``, whatever follows them above.
    """
    words = elements * value_bits // 32
    ranked = f"and.b32 at, {WORD}, {(1 << first) - 1:#x};"
    mask = (1 << elements) - 1
    aligned = 32 // value_bits - 1
    scale = (value_bits // 8).bit_length() - 1
    to_bytes = f"shl.b32 at, at, {scale};" if scale >= 0 else "shr.u32 at, at, 1;"
    lines = [
        f"shr.u32 bits, {WORD}, {first};" if first else f"mov.b32 bits, {WORD};",
        *([ranked, "popc.b32 rank, at;", f"add.u32 rank, rank, {BEFORE};"] if first else []),
        *([] if first else [f"mov.b32 rank, {BEFORE};"]),
        f"and.b32 at, rank, {~aligned};" if aligned else "mov.b32 at, rank;",
        to_bytes,
        "cvt.u64.u32 address, at;",
        f"add.u64 address, address, {ADDRESS};",
    ]
    if bounded:
        lines += [
            f"and.b32 needed, bits, {mask:#x};",
            "popc.b32 needed, needed;",
            f"and.b32 at, rank, {aligned};",
            "add.u32 needed, needed, at;",
        ]
    for i in range(words + 1):
        guard = "@more " if bounded else ""
        if bounded:
            lines.append(f"setp.gt.s32 more, needed, {i * 32 // value_bits};")
        lines.append(f"{guard}ld.global.nc.b32 loaded{i}, [address+{4 * i}];")
    lines.append(f"shl.b32 shift, rank, {value_bits.bit_length() - 1};")
    lines += [f"shf.r.wrap.b32 window{i}, loaded{i}, loaded{i + 1}, shift;" for i in range(words)]
    return lines


def _take(bit: int, left: int, select: str, store: list[str]) -> list[str]:
    """Drop the survivors of the bits from ``bit`` on in place and pass them.

    Args:
        left: window registers still needed afterwards.
    """
    lines = [
        f"shr.u32 index, bits, {bit};" if bit else "mov.b32 index, bits;",
        "shfl.sync.idx.b32 entry, table, index, 31, 0xffffffff;",
        select,
        *store,
    ]
    if left:
        lines.append("shr.u32 shift, entry, 16;")
    return lines + [
        f"shf.r.clamp.b32 window{i}, window{i}, window{i + 1}, shift;" for i in range(left)
    ]


def _unpack_fp8(bounded: bool, converts: bool) -> list[str]:
    lines = _nibble_table()
    for first in (0, 16):
        lines += _window(first, 16, 8, bounded)
        for nibble in range(4):
            out = first + 4 * nibble
            lines += _take(
                4 * nibble,
                3 - nibble,
                "prmt.b32 four, window0, zero, entry;",
                _convert_fp8(out) if converts else _widen_fp8(out),
            )
    return lines


def _convert_fp8(out: int) -> list[str]:
    """Four e4m3 bytes to float16."""
    lines = ["mov.b32 {half0, half1}, four;"]
    for i in range(2):
        lines += [f"cvt.rn.f16x2.e4m3x2 pair, half{i};", _store(out + 2 * i)]
    return lines


def _widen_fp8(out: int) -> list[str]:
    """The same by hand: exponent and mantissa move under float16's, which costs a factor of 2**-8.

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
            "mul.rn.f16x2 pair, pair, scale;",
            _store(out + 2 * i),
        ]
    return lines


def _unpack_16bit(bounded: bool, converts: bool) -> list[str]:
    lines = _pair_table()
    for first in range(0, ELEMENTS, 8):
        lines += _window(first, 8, 16, bounded)
        for pair in range(4):
            lines += _take(
                2 * pair,
                3 - pair,
                "prmt.b32 pair, window0, zero, entry;",
                [_store(first + 2 * pair)],
            )
    return lines


def _unpack_int4(bounded: bool, converts: bool) -> list[str]:
    lines = _nibble_table()
    for first in (0, 16):
        lines += _window(first, 16, 4, bounded) + _spread_nibbles()
        for nibble in range(4):
            out = first + 4 * nibble
            store = []
            for i, selector in enumerate(("0x4140", "0x4342")):
                store += [f"prmt.b32 pair, four, zero, {selector};", _store(out + 2 * i)]
            select = f"prmt.b32 four, window0, {ZERO}, entry;"
            lines += _take(4 * nibble, 3 - nibble, select, store)
    return lines


def _spread_nibbles() -> list[str]:
    """Sixteen nibbles in two registers to sixteen bytes ``code << 4`` in four."""
    lines = []
    for i in (1, 0):
        lines += [
            f"shl.b32 low, window{i}, 4;",
            "and.b32 low, low, 0xf0f0f0f0;",
            f"and.b32 high, window{i}, 0xf0f0f0f0;",
            f"prmt.b32 window{2 * i}, low, high, 0x5140;",
            f"prmt.b32 window{2 * i + 1}, low, high, 0x7362;",
        ]
    return lines


def _store(out: int) -> str:
    """The two halves of ``pair`` are two neighbouring elements."""
    return f"mov.b32 {{${out}, ${out + 1}}}, pair;"
