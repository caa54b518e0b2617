"""How the survivors of one pruned vector are stored as bytes.

A codec turns the k surviving values of a vector into ``k * bits / 8`` packed bytes plus
``scale_bytes`` bytes of scale, and back. The page layout (:mod:`vllm_sparsekv.format.layout`) takes
every size from these two numbers, so a new codec is one class and one entry in :data:`CODECS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from vllm_sparsekv.format.feedback import round_with_feedback


@dataclass(frozen=True)
class Codec:
    """What every codec has.

    Args:
        dtype: the model dtype (float16, bfloat16 or float32).

    Attributes:
        name: what settings call it.
        bits: of one survivor, on average.
        scale_bytes: of one vector, beside its survivors.
        integer: whether survivors become integers, which lose least in a basis of their own.
        whole_only: whether it takes only vectors that keep all their elements.
        bands: equal runs of elements with a scale each. With more than one they must be elements
            of a calibrated basis, the most important ones first.
    """

    dtype: torch.dtype
    name: ClassVar[str]
    bits: ClassVar[int]
    scale_bytes: ClassVar[int] = 0
    integer: ClassVar[bool] = False
    whole_only: ClassVar[bool] = False
    bands: ClassVar[int] = 1

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., bytes) uint8 and (..., scale_bytes) uint8."""
        raise NotImplementedError

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What :meth:`encode` gives -> (..., k) float32."""
        raise NotImplementedError


class AutoCodec(Codec):
    """Values in the model's own dtype, stored exactly."""

    name = "auto"

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.dtype.itemsize * 8

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k * bits / 8) uint8 and (..., 0) uint8."""
        stored = values.to(self.dtype).contiguous().view(torch.uint8)
        return stored, stored[..., :0]

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k * bits / 8) uint8 -> (..., k) float32. ``scales`` is empty."""
        return packed.contiguous().view(self.dtype).float()


class Fp8Codec(Codec):
    """float8 e4m3 without a scale: finite values saturate at +-448, Inf and NaN become NaN."""

    name = "fp8"
    bits = 8

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k) uint8 and (..., 0) uint8."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        values = values.float()
        saturated = values.clamp(-limit, limit).masked_fill(values.isinf(), float("nan"))
        stored = saturated.to(torch.float8_e4m3fn).contiguous().view(torch.uint8)
        return stored, stored[..., :0]

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k) uint8 -> (..., k) float32. ``scales`` is empty."""
        return _fp8_table(packed.device).take(packed.long())


@cache
def _fp8_table(device: torch.device) -> torch.Tensor:
    """All 256 float8 e4m3 values as float32; faster on CPU than torch's conversion."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


class IntegerCodec(Codec):
    """Integers in one or more runs of elements with a scale each."""

    integer = True

    def runs(self) -> tuple[IntCodec, ...]:
        """The codecs of the runs, which are of one length."""
        raise NotImplementedError

    def encode(
        self, values: torch.Tensor, feedback: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k * bits / 8) uint8 and (..., scale_bytes) uint8.

        Args:
            values: with feedback (..., num_kv_heads, D), whole vectors.
            feedback: (num_kv_heads, D, D), see :mod:`vllm_sparsekv.format.feedback`; scales do not
                depend on it.
        """
        values, codecs = values.float(), self.runs()
        runs = values.chunk(len(codecs), dim=-1)
        found = [codec.scale(run) for codec, run in zip(codecs, runs, strict=True)]
        step, zero, largest, gain = (
            torch.cat([x.expand_as(run) for x, run in zip(parts, runs, strict=True)], dim=-1)
            for parts in (
                [step for _, step, _ in found],
                [zero for _, _, zero in found],
                [values.new_tensor(2**codec.bits - 1) for codec in codecs],
                [values.new_tensor(codec.gain) for codec in codecs],
            )
        )
        codes = round_with_feedback(values, step, zero, largest, gain, feedback).int()
        packed = [
            codec.join(run)
            for codec, run in zip(codecs, codes.chunk(len(codecs), dim=-1), strict=True)
        ]
        scales = [scale.view(torch.uint8) for scale, _, _ in found]
        return torch.cat(packed, dim=-1), torch.cat(scales, dim=-1)


class IntCodec(IntegerCodec):
    """Asymmetric b-bit integers: value = step * (code - zero), 2 bytes of scale a vector.

    Codes 0 .. 2 ** b - 1 form a little-endian bit stream: code i is bits b * i .. b * i + b - 1,
    counted from bit 0 of byte 0. The scale is one little-endian uint16 u::

        bits 15..7  step: the exponent (5) and the upper 4 mantissa bits of a positive float16,
                    whose bits are (u >> 1) & 0x7fc0
        bits  6..0  zero: the code of value 0, in units of 2 ** (b - 7)

    ``step * code - step * zero`` is exact in float32 in any order. Encoding takes
    ``low = min(values, 0)`` and ``high = max(values, 0)``; step is ``(high - low) / steps`` rounded
    to float16, then to 4 mantissa bits (ties up); zero centres the codes on the middle of the
    range. A value x takes the code nearest to ``gain * x``. With a gain of 1 what the codes reach
    is off by at most half a step while step is a normal float16; below that step is a multiple of
    2 ** -18. A vector with Inf, NaN or a step beyond float16 decodes to NaN throughout (step is
    NaN).

    Attributes:
        steps: steps from low to high. With up to 2 ** b of them the codes reach every value of a
            vector of both signs. Smaller steps clip the outermost ones, which takes energy from a
            vector, and what every vector of a context lacks does not average out.
        gain: gives energy back that few codes take even so.
    """

    steps: ClassVar[float]
    gain: ClassVar[float] = 1
    scale_bytes = 2

    def runs(self) -> tuple[IntCodec, ...]:
        return (self,)

    def scale(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(..., k) float32 -> (..., 1) uint16, and float32 step and zero, the latter in codes."""
        largest, units = 2**self.bits - 1, 2 ** (7 - self.bits)
        low, high = values.aminmax(dim=-1, keepdim=True)
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = ((high - low) / self.steps).half()
        step_bits = step.view(torch.int16).int() + 0x20 & 0x7FC0
        step_bits = step_bits.masked_fill(~step.isfinite() | (step_bits >= 0x7C00), 0x7FC0)
        step = step_bits.to(torch.int16).view(torch.float16).float()
        zero = units * largest / 2 - units / 2 * (low + high) * self.gain / step
        zero = zero.nan_to_num(0, 0, 0).round().clamp(0, 127)
        return (step_bits << 1 | zero.int()).to(torch.uint16), step, zero / units

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k * bits / 8) and (..., 2) uint8 -> (..., k) float32."""
        scale = scales.contiguous().view(torch.uint16).int()
        step = (scale >> 1 & 0x7FC0).to(torch.int16).view(torch.float16).float()
        zero = (scale & 127) / 2 ** (7 - self.bits)
        return self.split(packed).float().mul_(step).sub_(step * zero)

    def join(self, codes: torch.Tensor) -> torch.Tensor:
        """(..., k) int32 -> (..., k * bits / 8) uint8, as few whole bytes at a time as can be."""
        size = math.lcm(8, self.bits)
        word = sum(
            codes[..., i :: size // self.bits] << self.bits * i for i in range(size // self.bits)
        )
        return torch.stack([word >> shift for shift in range(0, size, 8)], -1).flatten(-2).byte()

    def split(self, packed: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`join`."""
        size = math.lcm(8, self.bits)
        if size > 8:
            packed = sum(packed[..., i :: size // 8].int() << 8 * i for i in range(size // 8))
        mask = 2**self.bits - 1
        codes = [(packed >> shift & mask).byte() for shift in range(0, size, self.bits)]
        return torch.stack(codes, -1).flatten(-2)


class Int4Codec(IntCodec):
    """4 bits, for pruned and for whole vectors; both ends of the range are codes."""

    name = "int4"
    bits = 4
    steps = 15


class Int3Codec(IntCodec):
    """3 bits, for vectors that keep all their elements."""

    name = "int3"
    bits = 3
    whole_only = True
    steps = 7.5


class Int2Codec(IntCodec):
    """2 bits, for vectors that keep all their elements."""

    name = "int2"
    bits = 2
    whole_only = True
    steps = 4
    gain = 17 / 16


class Int4Int2Codec(IntegerCodec):
    """3 bits on average: the first half of the elements int4, then the second half int2.

    In a calibrated basis the first half of a key's elements holds nearly all that its scores depend
    on. The int4 codes come before those of int2, the first half's scale before the other's.
    """

    name = "int4_int2"
    bits = 3
    scale_bytes = 4
    whole_only = True
    bands = 2

    def runs(self) -> tuple[IntCodec, ...]:
        return Int4Codec(self.dtype), Int2Codec(self.dtype)

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k * 3 / 8) and (..., 4) uint8 -> (..., k) float32."""
        third = packed.shape[-1] // 3
        first, second = self.runs()
        return torch.cat(
            [
                first.decode(packed[..., : 2 * third], scales[..., :2]),
                second.decode(packed[..., 2 * third :], scales[..., 2:]),
            ],
            dim=-1,
        )


CODECS: dict[str, type[Codec]] = {
    codec.name: codec
    for codec in (AutoCodec, Fp8Codec, Int4Codec, Int3Codec, Int2Codec, Int4Int2Codec)
}
