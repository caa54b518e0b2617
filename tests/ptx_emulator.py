"""Runs the PTX instructions of our inline assembly on NumPy arrays: an element is a lane."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import torch

LANES = 32
_FP8_TO_FP16 = (
    torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half().numpy().view(np.uint16)
)


def run(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Execute ``text`` for every element of the inputs, in warps of 32 consecutive elements.

    Args:
        inputs: equally long 1-D integer arrays, operands ``$outputs`` on.
        outputs: 16-bit or 32-bit results, operands ``$0`` on.

    Raises:
        ValueError: an instruction is unknown here.
    """
    count = len(inputs[0])
    pad = -count % LANES
    inputs = [np.pad(x, (0, pad), mode="edge") for x in inputs]
    registers = {
        f"${outputs + i}": x.astype(np.int64).view(np.uint64) for i, x in enumerate(inputs)
    }
    machine = _Machine(registers, count + pad)
    for line in text.replace("{\n", "").splitlines():
        for instruction in re.findall(r"[^;]+;", line):
            machine.execute(instruction.strip(" ;"))
    return [registers[f"${i}"][:count] for i in range(outputs)]


class _Machine:
    def __init__(self, registers: dict[str, np.ndarray], size: int) -> None:
        self.registers = registers
        self.lane = np.arange(size, dtype=np.uint64) % LANES
        self.warp = np.arange(size) // LANES * LANES

    def read(self, operand: str, bits: int = 32) -> np.ndarray:
        if operand == "%laneid":
            return self.lane
        mask = np.uint64(2**bits - 1)
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", operand):
            return np.full_like(self.lane, int(operand, 0) % 2**64) & mask
        return self.registers[operand] & mask

    def execute(self, instruction: str) -> None:
        if instruction.startswith("."):
            return
        opcode, rest = instruction.split(None, 1)
        method = getattr(self, "do_" + opcode.replace(".", "_"), None)
        if method is None:
            raise ValueError(f"instruction {instruction!r}: not emulated")
        operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        method(*operands)

    def do_mov_b32(self, target: str, source: str) -> None:
        if target.startswith("{"):
            low, high = re.findall(r"[^{},\s]+", target)
            value = self.read(source)
            self.registers[low], self.registers[high] = value & 0xFFFF, value >> np.uint64(16)
        else:
            self.registers[target] = self.read(source)

    do_mov_u32 = do_mov_b32

    def do_and_b32(self, target: str, a: str, b: str) -> None:
        self.registers[target] = self.read(a) & self.read(b)

    def do_or_b32(self, target: str, a: str, b: str) -> None:
        self.registers[target] = self.read(a) | self.read(b)

    def do_not_b32(self, target: str, a: str) -> None:
        self.registers[target] = ~self.read(a) & np.uint64(0xFFFFFFFF)

    def do_shl_b32(self, target: str, a: str, b: str) -> None:
        self.registers[target] = self.read(a) << self.read(b) & np.uint64(0xFFFFFFFF)

    def do_shr_u32(self, target: str, a: str, b: str) -> None:
        self.registers[target] = self.read(a) >> self.read(b)

    def do_shr_s32(self, target: str, a: str, b: str) -> None:
        shifted = self._signed(a) >> self.read(b).astype(np.int64)
        self.registers[target] = shifted.view(np.uint64) & np.uint64(0xFFFFFFFF)

    def do_sub_s32(self, target: str, a: str, b: str) -> None:
        self.registers[target] = self.read(a) - self.read(b) & np.uint64(0xFFFFFFFF)

    def do_mad_wide_s32(self, target: str, a: str, b: str, c: str) -> None:
        product = (self._signed(a) * self._signed(b)).view(np.uint64)
        self.registers[target] = product + self.read(c, 64)

    def do_mad_lo_s32(self, target: str, a: str, b: str, c: str) -> None:
        result = (self._signed(a) * self._signed(b) + self._signed(c)).view(np.uint64)
        self.registers[target] = result & np.uint64(0xFFFFFFFF)

    def _signed(self, operand: str) -> np.ndarray:
        return self.read(operand).astype(np.uint32).view(np.int32).astype(np.int64)

    def do_popc_b32(self, target: str, a: str) -> None:
        bits = self.read(a).astype("<u4").view(np.uint8).reshape(-1, 4)
        self.registers[target] = np.unpackbits(bits, axis=1).sum(1).astype(np.uint64)

    def do_shf_l_wrap_b32(self, target: str, low: str, high: str, shift: str) -> None:
        self._funnel(target, low, high, self.read(shift) % 32)

    def do_shf_l_clamp_b32(self, target: str, low: str, high: str, shift: str) -> None:
        self._funnel(target, low, high, np.minimum(self.read(shift), 32))

    def _funnel(self, target: str, low: str, high: str, shift: np.ndarray) -> None:
        both = self.read(low) | self.read(high) << np.uint64(32)
        self.registers[target] = both >> np.uint64(32) - shift & np.uint64(0xFFFFFFFF)

    def do_shfl_sync_idx_b32(self, target: str, a: str, lane: str, clamp: str, mask: str) -> None:
        assert int(clamp) == LANES - 1 and int(mask, 0) == 2**32 - 1
        source = self.warp + (self.read(lane) % LANES).astype(np.int64)
        self.registers[target] = self.read(a)[source]

    def do_prmt_b32(self, target: str, a: str, b: str, selector: str) -> None:
        both = self.read(a) | self.read(b) << np.uint64(32)
        choice, result = self.read(selector), np.zeros_like(both)
        for i in range(4):
            digit = choice >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(byte > 127, 0xFF, 0).astype(np.uint64)
            result |= np.where(digit > 7, sign, byte) << np.uint64(8 * i)
        self.registers[target] = result

    def do_cvt_rn_f16x2_e4m3x2(self, target: str, a: str) -> None:
        value = self.read(a, 16)
        low, high = (
            _FP8_TO_FP16[x].astype(np.uint64) for x in (value & 0xFF, value >> np.uint64(8))
        )
        self.registers[target] = low | high << np.uint64(16)

    def do_mul_rn_f16x2(self, target: str, a: str, b: str) -> None:
        self._halves(target, lambda x, y: x * y, a, b)

    def do_fma_rn_f16x2(self, target: str, a: str, b: str, c: str) -> None:
        self._halves(target, lambda x, y, z: x * y + z, a, b, c)

    def _halves(self, target: str, function, *operands: str) -> None:
        result = np.zeros_like(self.lane)
        for shift in (np.uint64(0), np.uint64(16)):
            half = [
                (self.read(x) >> shift).astype(np.uint16).view(np.float16).astype(np.float64)
                for x in operands
            ]
            with np.errstate(invalid="ignore", over="ignore"):
                value = function(*half).astype(np.float16)
            result |= value.view(np.uint16).astype(np.uint64) << shift
        self.registers[target] = result

    def do_lg2_approx_ftz_f32(self, target: str, a: str) -> None:
        value = self.read(a).astype(np.uint32).view(np.float32)
        self.registers[target] = np.log2(value).view(np.uint32).astype(np.uint64)

    def do_ld_global_nc_b32(self, target: str, place: str) -> None:
        self._load(target, place, np.uint32)

    def do_ld_global_nc_u16(self, target: str, place: str) -> None:
        self._load(target, place, np.uint16)

    def do_prefetch_global_L2(self, place: str) -> None:
        self._load("prefetched", place, np.uint8)

    def _load(self, target: str, place: str, kind: type) -> None:
        size = np.dtype(kind).itemsize
        base, _, offset = place.strip("[]").partition("+")
        address = self.read(base, 64) + np.int64(int(offset or 0)).view(np.uint64)
        assert not (address % np.uint64(size)).any(), "misaligned load"
        first, last = int(address.min()), int(address.max())
        span = (ctypes.c_uint8 * (last - first + size)).from_address(first)
        index = (address - np.uint64(first)) // np.uint64(size)
        self.registers[target] = np.frombuffer(span, dtype=kind)[index.astype(int)]
