"""How the survivors of one pruned vector are stored as bytes.

A codec turns the k surviving values of a vector into ``k * bits / 8`` packed bytes plus
``scale_bytes`` bytes of scale, and back. The page layout (:mod:`vllm_sparsekv.format`) takes every
size from these two numbers, so a new codec is one class and one entry in :data:`CODECS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class AutoCodec:
    """Values in the model's own dtype, stored exactly.

    Args:
        dtype: the model dtype (float16, bfloat16 or float32).
    """

    dtype: torch.dtype
    name = "auto"
    scale_bytes = 0

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k * bits / 8) uint8 and (..., 0) uint8."""
        stored = values.to(self.dtype).contiguous().view(torch.uint8)
        return stored, stored[..., :0]

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k * bits / 8) uint8 -> (..., k) float32. ``scales`` is empty."""
        return packed.contiguous().view(self.dtype).float()


@dataclass(frozen=True)
class Fp8Codec:
    """float8 e4m3 without a scale: finite values saturate at +-448, Inf and NaN become NaN."""

    dtype: torch.dtype
    name = "fp8"
    bits = 8
    scale_bytes = 0

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


@dataclass(frozen=True)
class Int4Codec:
    """Asymmetric 4-bit: value = step * (code - zero / 8), code in 0..15, 2 bytes of scale a vector.

    Survivor 2i is the low nibble of byte i, survivor 2i + 1 the high one. The scale is one
    little-endian uint16 u::

        bits 15..7  step: the exponent (5) and the upper 4 mantissa bits of a positive float16,
                    whose bits are (u >> 1) & 0x7fc0
        bits  6..0  zero: the code of value 0 in eighths, 0..127

    ``low = step * zero / -8`` and ``low + step * code`` are exact in float32 in any order. Encoding
    takes ``low = min(values, 0)`` and ``high = max(values, 0)``; step is ``(high - low) / 15``
    rounded to float16, then to 4 mantissa bits (ties up); zero centres the 16 codes on the middle
    of the range. The error is at most half a step while step is a normal float16; below that step
    is a multiple of 2 ** -18. A vector with Inf, NaN or a step beyond float16 decodes to NaN
    throughout (step is NaN).
    """

    dtype: torch.dtype
    name = "int4"
    bits = 4
    scale_bytes = 2

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k / 2) uint8 and (..., 2) uint8."""
        values = values.float()
        low, high = values.aminmax(dim=-1, keepdim=True)
        low, high = low.clamp_max(0), high.clamp_min(0)
        step = ((high - low) / 15).half()
        step_bits = step.view(torch.int16).int() + 0x20 & 0x7FC0
        step_bits = step_bits.masked_fill(~step.isfinite() | (step_bits >= 0x7C00), 0x7FC0)
        step = step_bits.to(torch.int16).view(torch.float16).float()
        zero = (60 - 4 * (low + high) / step).nan_to_num(0, 0, 0).round().clamp(0, 127)
        codes = (values / step + zero / 8).nan_to_num(0).round().clamp(0, 15).to(torch.uint8)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        scale = (step_bits << 1 | zero.int()).to(torch.uint16)
        return packed, scale.view(torch.uint8)

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k / 2) and (..., 2) uint8 -> (..., k) float32."""
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()
        scale = scales.contiguous().view(torch.uint16).int()
        step = (scale >> 1 & 0x7FC0).to(torch.int16).view(torch.float16).float()
        return codes.mul_(step).sub_(step * (scale & 127) / 8)


Codec = AutoCodec | Fp8Codec | Int4Codec

CODECS: dict[str, type[Codec]] = {"auto": AutoCodec, "fp8": Fp8Codec, "int4": Int4Codec}
