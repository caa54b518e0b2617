"""Heads that fill no power of two, as two tiles that do: 96 as 64 and 32, 192 as 128 and 64."""

from __future__ import annotations

import triton
import triton.language as tl


def parts(size: int) -> tuple[int, int]:
    """Elements of the two tiles; the second is 0 where one must do."""
    third = size // 3
    if size % 3 or third & (third - 1):
        return triton.next_power_of_2(size), 0
    return 2 * third, third


@triton.jit
def split_columns(x):
    """Columns of x (ROWS, 4 n): the first 2 n and the next n."""
    first, second = halve(x)
    return first, halve(second)[0]


@triton.jit
def halve(x):
    """The first and the second half of the columns of x (ROWS, 2 n)."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))


@triton.jit
def join_rows(first, rest):
    """(2 n, COLUMNS) and (n, COLUMNS) one below the other, then zeros: (4 n, COLUMNS)."""
    return _stack(first, _stack(rest, tl.zeros_like(rest)))


@triton.jit
def _stack(upper, lower):
    ROWS: tl.constexpr = upper.shape[0]
    COLUMNS: tl.constexpr = upper.shape[1]
    return tl.reshape(tl.permute(tl.join(upper, lower), [2, 0, 1]), [2 * ROWS, COLUMNS])
