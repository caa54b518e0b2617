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
    """Asymmetric 4-bit: value = low + step * code, code in 0..15, low and step per vector.

    Scale bytes are ``low`` then ``step``, each float16. Survivor 2i is the low nibble of byte i,
    survivor 2i + 1 the high one. A vector with Inf, NaN or a spread beyond float16 decodes to NaN
    throughout.
    """

    dtype: torch.dtype
    name = "int4"
    bits = 4
    scale_bytes = 4

    def encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., k) floats -> (..., k / 2) uint8 and (..., 4) uint8."""
        values = values.float()
        low, high = values.aminmax(dim=-1, keepdim=True)
        low = low.half()
        step = ((high - low.float()) / 15).half()
        codes = (values - low.float()) / step.float()
        codes = codes.nan_to_num(0).round().clamp(0, 15).to(torch.uint8)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        low = low.masked_fill(~(low.isfinite() & step.isfinite()), float("nan"))
        return packed, torch.cat([low, step], dim=-1).view(torch.uint8)

    def decode(self, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(..., k / 2) and (..., 4) uint8 -> (..., k) float32."""
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).float()
        low, step = scales.contiguous().view(torch.float16).float().split(1, dim=-1)
        return low + step * codes


Codec = AutoCodec | Fp8Codec | Int4Codec

CODECS: dict[str, type[Codec]] = {"auto": AutoCodec, "fp8": Fp8Codec, "int4": Int4Codec}
