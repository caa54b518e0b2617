"""What a slot of the window holds: the newest tokens of a request, whole.

A ring of slots per request, in blocks of its own. One slot has a key and a value vector, D elements
each of the model dtype or of int8, and 8 bytes::

    +-------+-------+--------------------+----------------------------------+
    | K (D) | V (D) | int32 position + 1 | int8: bfloat16 step of K, of V   |
    +-------+-------+--------------------+----------------------------------+

A slot holds position p only if its tag equals p + 1, so zeroed memory holds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TAG_BYTES = 8
"""Behind the two vectors."""
LARGEST = 127
"""Code of int8."""


class WindowSlots(NamedTuple):
    """Views into window blocks, each (num_blocks, num_kv_heads, slots, ...)."""

    key: torch.Tensor
    """(..., D) model dtype or int8."""
    value: torch.Tensor
    """As the key."""
    tag: torch.Tensor
    """(...) int32, position + 1, 0 when empty."""
    key_step: torch.Tensor | None
    """(...) bfloat16, what codes count in; None in the model dtype."""
    value_step: torch.Tensor | None
    """As that of the key."""

    @classmethod
    def of(cls, window: torch.Tensor, head_size: int) -> WindowSlots:
        """Of blocks (num_blocks, num_kv_heads, slots, slot elements), model dtype or int8."""
        behind = window[..., 2 * head_size :]
        steps = behind.view(torch.bfloat16) if window.dtype == torch.int8 else None
        return cls(
            window[..., :head_size],
            window[..., head_size : 2 * head_size],
            behind.view(torch.int32)[..., 0],
            None if steps is None else steps[..., 2],
            None if steps is None else steps[..., 3],
        )


def to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., D) floats -> codes (..., D) int8 and steps (...) bfloat16; a value is code * step.

    The step is a 127th of the largest magnitude, cut off to bfloat16, so that no value is read back
    larger than that. Codes are the nearest, the largest one up to a step off. A vector with Inf or
    NaN reads back as NaN throughout.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    step = ((largest / LARGEST).view(torch.int32) & -0x10000).view(torch.float32)
    step = step.masked_fill(~largest.isfinite(), torch.nan)
    codes = (x / step).nan_to_num(0, 0, 0).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), step.squeeze(-1).to(torch.bfloat16)


def from_int8(codes: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What :func:`to_int8` gives -> (..., D) float32."""
    return codes.float() * step.float().unsqueeze(-1)
