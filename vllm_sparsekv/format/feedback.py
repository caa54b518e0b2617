"""Rounding errors passed on: what some elements of a vector get wrong, later ones make up for.

Scores and outputs see an error e of a vector as ``e R e^t``, R the second moment of what reads it.
Elements rounded each by itself cost as much as R has energy on average; when each first takes in
what those before it got wrong, nearly the geometric mean of R's eigenvalues (for weights: GPTQ,
arXiv 2210.17323; LDLQ, arXiv 2307.13304). Only encoding changes: what reads the codes knows nothing
of it.

Elements of one block are rounded together, then the ones behind them take in their errors.
"""

from __future__ import annotations

import torch


def block_length(head_size: int) -> int:
    """Elements that are rounded together: a power of two that divides half of a vector.

    About an eighth of a vector: shorter blocks gain less than 0.2 dB.
    """
    return max(
        n for n in (8, 16, 32, 64) if n <= max(8, head_size // 8) and head_size // 2 % n == 0
    )


def feedback_matrix(reader: torch.Tensor) -> torch.Tensor:
    """How much of each element's error the later ones take in.

    Args:
        reader: R, (..., D, D) float64, positive definite.

    Returns:
        F, (..., D, D) float64, zero where the column's block is not behind the row's: element j is
        rounded at ``x[j] - sum(error[i] * F[i, j])``, where ``error R error^t`` would be least if
        all elements from j on were not rounded.
    """
    size = reader.shape[-1]
    length = block_length(size)
    matrix = torch.zeros_like(reader)
    for start in range(length, size, length):
        block = slice(start, start + length)
        made_up = torch.linalg.solve(reader[..., start:, start:], reader[..., start:, :start])
        matrix[..., :start, block] = made_up[..., :length, :].mT
    return matrix


def round_with_feedback(
    values: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    largest: torch.Tensor,
    gain: torch.Tensor,
    matrix: torch.Tensor | None,
) -> torch.Tensor:
    """Integers 0 .. largest that stand for ``step * (integer - zero)``; 0 where that is NaN.

    Args:
        values: (..., D) float32, with a matrix (..., num_kv_heads, D).
        step, zero, largest: (..., D) float32 of each element.
        gain: likewise; the integer nearest to this times the value is taken.
        matrix: (num_kv_heads, D, D) of :func:`feedback_matrix`; None: each to the nearest.

    Returns:
        (..., D) float32.
    """
    if matrix is None:
        return _nearest(values * gain, step, zero, largest)
    codes, errors = torch.zeros_like(values), torch.zeros_like(values)
    length = block_length(values.shape[-1])
    for start in range(0, values.shape[-1], length):
        block = slice(start, start + length)
        taken_in = torch.einsum(
            "...hi,hij->...hj", errors[..., :start], matrix[:, :start, block].float()
        )
        target = (values[..., block] - taken_in) * gain[..., block]
        code = _nearest(target, step[..., block], zero[..., block], largest[..., block])
        stored = step[..., block] * code - step[..., block] * zero[..., block]
        codes[..., block], errors[..., block] = code, stored - values[..., block]
    return codes


def _nearest(
    values: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    return torch.minimum((values / step + zero).nan_to_num(0).round().clamp_min(0), largest)
