"""The PTX that unpacks a bitmap word, run instruction by instruction against plain Python."""

from __future__ import annotations

import numpy as np
import ptx_emulator
import pytest

from vllm_sparsekv.kernels.attention.ptx import (
    CODE_SHIFTS,
    ELEMENTS,
    OVERRUN,
    decode_word,
    unpack_word,
)

WORDS = (
    [0, 0xFFFFFFFF, 1, 0x80000000, 0xFFFF, 0xFFFF0000, 0x55555555, 0xAAAAAAAA, 0x0F0F0F0F]
    + [0xFFFFFFFF >> n for n in range(32)]
    + [2**32 - 2**n for n in range(32)]
    + np.random.default_rng(0).integers(2**32, size=151, dtype=np.uint64).tolist()
)
BITS = {"auto": 16, "fp8": 8, "int4": 4}


class Survivors:
    """Packed survivors behind room for the overrun, 256 to a vector, one vector per word."""

    def __init__(self, codec: str) -> None:
        rng = np.random.default_rng(1)
        self.codec = codec
        self.bits = BITS[codec]
        self.codes = rng.integers(2**self.bits, size=(len(WORDS), 256)).astype(np.uint64)
        if codec == "fp8":
            self.codes[self.codes % 128 == 127] = 0
        self.before = rng.integers(256 - ELEMENTS, size=len(WORDS))
        self.before[::3] = 0
        self.packed = np.full((len(WORDS), (OVERRUN + 32 * self.bits) // 4), 2**32 - 1, np.uint32)
        for word in range(256 * self.bits // 32):
            column = self.packed[:, OVERRUN // 4 + word]
            column[:] = 0
            for i in range(32 // self.bits):
                code = self.codes[:, word * (32 // self.bits) + i].astype(np.uint32)
                column |= code << np.uint32(i * self.bits)
        rows = np.arange(len(WORDS)) * self.packed.strides[0]
        self.address = self.packed.ctypes.data + OVERRUN + rows

    @property
    def end(self) -> np.ndarray:
        """(words,): survivors up to the end of each word."""
        return self.before + [word.bit_count() for word in WORDS]

    def expected(self, pruned: np.ndarray) -> np.ndarray:
        """(words, 32): each survivor's code in its element's place, ``pruned`` elsewhere."""
        out = np.repeat(pruned[:, None], ELEMENTS, axis=1).astype(np.uint64)
        for row, word in enumerate(WORDS):
            rank = self.before[row]
            for bit in range(ELEMENTS):
                if word >> bit & 1:
                    out[row, bit] = self.codes[row, rank]
                    rank += 1
        return out

    def run(self, converts_fp8: bool = True, zero: np.ndarray | None = None) -> np.ndarray:
        inputs = [np.array(WORDS), self.end, self.address]
        if self.codec == "int4":
            inputs.append(zero * 0x02020202)
        text = unpack_word(self.codec, converts_fp8)
        return halves(ptx_emulator.run(text, inputs, ELEMENTS // 2))


def halves(pairs: list[np.ndarray]) -> np.ndarray:
    """Results of two 16-bit elements each, (n, elements) uint16."""
    return np.stack(pairs, axis=1).astype("<u4").view(np.uint16)


def fp8_values(codes: np.ndarray) -> np.ndarray:
    codes = codes.astype(np.int64)
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(sign, -magnitude, magnitude)


def test_16bit_values():
    survivors = Survivors("auto")
    assert (survivors.run() == survivors.expected(np.zeros(len(WORDS)))).all()


@pytest.mark.parametrize("converts_fp8", [False, True])
def test_fp8(converts_fp8):
    survivors = Survivors("fp8")
    expected = fp8_values(survivors.expected(np.zeros(len(WORDS))))
    assert (survivors.run(converts_fp8).view(np.float16) == expected).all()


def test_int4():
    survivors = Survivors("int4")
    zero = np.arange(len(WORDS)) % 128
    sixteenths = survivors.expected(2 * zero)
    survivor = survivors.expected(np.full(len(WORDS), 999)) != 999
    sixteenths = np.where(survivor, 16 * sixteenths, sixteenths)
    assert (survivors.run(zero=zero) == sixteenths).all()


@pytest.mark.parametrize("converts_fp8", [False, True])
def test_fp8_of_a_whole_vector(converts_fp8):
    codes = np.array([code for code in range(256) if code % 128 != 127] * 2).reshape(-1, 4)
    words = codes.astype(np.uint8).view("<u4").ravel().astype(np.int64)
    actual = halves(ptx_emulator.run(decode_word("fp8", converts_fp8), [words], 2))
    assert (actual.view(np.float16) == fp8_values(codes)).all()


@pytest.mark.parametrize(
    ("codec", "bits", "words"), [("int4", 4, 1), ("int3", 3, 3), ("int2", 2, 1)]
)
def test_integers_of_a_whole_vector(codec, bits, words):
    shifts = np.array(CODE_SHIFTS[codec])
    outputs = len(shifts)
    codes = np.random.default_rng(0).integers(2**bits, size=(100, 2 * outputs))
    codes[:2] = [[0], [2**bits - 1]]
    streams = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    inputs = [np.array([x >> 32 * i & 0xFFFFFFFF for x in streams]) for i in range(words)]
    actual = halves(ptx_emulator.run(decode_word(codec, True), inputs, outputs))
    assert (actual[:, 0::2] == codes[:, :outputs] << shifts).all()
    assert (actual[:, 1::2] == codes[:, outputs:] << shifts).all()
    assert actual.max() < 1024, "not a subnormal float16"


@pytest.mark.parametrize("codec", BITS)
def test_reads_end_with_the_survivors(codec, monkeypatch):
    """What is read too much lies before the vector, where a page always has something."""
    survivors = Survivors(codec)
    past, before = [], []
    load = ptx_emulator._Machine.do_ld_global_nc_b32

    def watched(self, target, place):
        base, _, offset = place.strip("[]").partition("+")
        start = (self.read(base, 64).astype(np.int64) + int(offset))[: len(WORDS)]
        before.append((survivors.address - start).max())
        past.append(
            (start + 4 - survivors.address - -(-survivors.end * BITS[codec] // 32) * 4).max()
        )
        load(self, target, place)

    monkeypatch.setattr(ptx_emulator._Machine, "do_ld_global_nc_b32", watched)
    survivors.run(zero=np.zeros(len(WORDS), int))
    assert max(past) <= 0
    assert 0 < max(before) <= OVERRUN


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(ValueError, match="not emulated"):
        ptx_emulator.run("{\nbrev.b32 $0, $1;\n}", [np.zeros(1, np.int64)], 1)
