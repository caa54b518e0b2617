"""The PTX that unpacks a bitmap word, run instruction by instruction against plain Python."""

from __future__ import annotations

import numpy as np
import ptx_emulator
import pytest

from vllm_sparsekv.kernels.attention.ptx import ELEMENTS, unpack_word

WORDS = (
    [0, 0xFFFFFFFF, 1, 0x80000000, 0xFFFF, 0xFFFF0000, 0x55555555, 0xAAAAAAAA, 0x0F0F0F0F]
    + [0xFFFFFFFF >> n for n in range(32)]
    + np.random.default_rng(0).integers(2**32, size=151, dtype=np.uint64).tolist()
)
BITS = {"auto": 16, "fp8": 8, "int4": 4}


class Survivors:
    """Packed survivors in front of ``words`` of one thread each, 256 to a vector."""

    def __init__(self, codec: str) -> None:
        rng = np.random.default_rng(1)
        self.bits = BITS[codec]
        self.codes = rng.integers(2**self.bits, size=(len(WORDS), 256)).astype(np.uint64)
        if codec == "fp8":
            self.codes[self.codes % 128 == 127] = 0
        self.before = rng.integers(256 - ELEMENTS, size=len(WORDS))
        self.packed = np.zeros((len(WORDS), 256 * self.bits // 32 + 5), np.uint32)
        for word in range(256 * self.bits // 32):
            for i in range(32 // self.bits):
                code = self.codes[:, word * (32 // self.bits) + i].astype(np.uint32)
                self.packed[:, word] |= code << np.uint32(i * self.bits)
        self.address = self.packed.ctypes.data + np.arange(len(WORDS)) * self.packed.strides[0]

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

    def run(self, codec: str, bounded: bool, converts_fp8: bool, *more: np.ndarray) -> np.ndarray:
        inputs = [np.array(WORDS), self.before, self.address, *more]
        text = unpack_word(codec, bounded, converts_fp8)
        return np.stack(ptx_emulator.run(text, inputs, ELEMENTS), axis=1)


@pytest.mark.parametrize("bounded", [False, True])
def test_16bit_values(bounded):
    survivors = Survivors("auto")
    expected = survivors.expected(np.zeros(len(WORDS)))
    assert (survivors.run("auto", bounded, True) == expected).all()


@pytest.mark.parametrize("converts_fp8", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
def test_fp8(bounded, converts_fp8):
    survivors = Survivors("fp8")
    codes = survivors.expected(np.zeros(len(WORDS))).astype(np.int64)
    sign, exponent, mantissa = codes >> 7, codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    halves = survivors.run("fp8", bounded, converts_fp8).astype(np.uint16).view(np.float16)
    assert (halves == np.where(sign, -magnitude, magnitude)).all()


@pytest.mark.parametrize("bounded", [False, True])
def test_int4(bounded):
    survivors = Survivors("int4")
    zero = np.arange(len(WORDS)) % 128
    sixteenths = survivors.expected(2 * zero)
    survivor = survivors.expected(np.full(len(WORDS), 999)) != 999
    sixteenths = np.where(survivor, 16 * sixteenths, sixteenths)
    actual = survivors.run("int4", bounded, True, zero * 0x02020202)
    assert (actual == sixteenths).all()


@pytest.mark.parametrize("codec", BITS)
def test_bounded_reads_end_with_the_survivors(codec, monkeypatch):
    """And unbounded ones at most 20 bytes later, what the layout of a page makes room for."""
    survivors = Survivors(codec)
    ends = np.array([survivors.before[i] + bin(word).count("1") for i, word in enumerate(WORDS)])
    last = survivors.address + -(-ends * BITS[codec] // 32) * 4
    overrun = {}
    load = ptx_emulator._Machine.do_ld_global_nc_b32

    def watched(self, target, place, where=None):
        base, _, offset = place.strip("[]").partition("+")
        end = self.read(base, 64).astype(np.int64) + int(offset or 0) + 4
        wanted = np.ones(len(end), bool) if where is None else where
        past = (end - np.pad(last, (0, len(end) - len(last)), mode="edge"))[wanted]
        overrun[bounded] = max(overrun.get(bounded, -99), past.max(initial=-99))
        load(self, target, place, where)

    monkeypatch.setattr(ptx_emulator._Machine, "do_ld_global_nc_b32", watched)
    for bounded in (True, False):
        zero = [np.zeros(len(WORDS), int)] if codec == "int4" else []
        survivors.run(codec, bounded, True, *zero)
    assert overrun[True] <= 0
    assert 0 < overrun[False] <= 20


def test_an_unknown_instruction_is_an_error():
    with pytest.raises(ValueError, match="not emulated"):
        ptx_emulator.run("{\nbrev.b32 $0, $1;\n}", [np.zeros(1, np.int64)], 1)
