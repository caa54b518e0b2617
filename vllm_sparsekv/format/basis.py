"""The basis in which a layer's keys and values are stored.

Elements quantised with few bits lose least when they are all of one size, so vectors that keep
every element in an integer codec are stored rotated: their energy is then spread evenly (QuaRot,
arXiv 2404.00456). Pruned vectors stay as they are: pruning lives on elements of different sizes.

Integer vectors can take a calibrated basis instead (:mod:`vllm_sparsekv.calibration`), one matrix
and one mean per KV head. It makes elements matter as much as they are large, and of sizes as
different as can be, so pruned vectors are stored in it as they are, and whole ones rotated on top
of it, each band of their codec by itself. What all vectors of a head share, their mean, is taken
off first.

Attention needs no vector back. With keys stored as ``(k - m) F`` and queries taken as ``q F^-T``
all scores of a query are less by the same ``q . m``, which softmax does not see as long as every
key it covers is stored so: those of the window and of the step are. With values stored as
``(v - m) F`` the output is ``o F^-1 + m``, as weights add up to 1. Neither holds where attention
has sinks, nor the first where it caps scores: means are 0 there.

How much what reads a vector depends on each of its elements is part of a calibrated basis. Whole
integer vectors are rounded by it, see :mod:`vllm_sparsekv.format.feedback`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from vllm_sparsekv.format.feedback import feedback_matrix
from vllm_sparsekv.format.layout import SparseFormat, VectorFormat


class LayerBasis(NamedTuple):
    """A calibrated basis of one layer: vectors are stored as ``(x - mean) @ matrix``."""

    key: torch.Tensor
    """(num_kv_heads, D, D)"""
    value: torch.Tensor
    """(num_kv_heads, D, D)"""
    key_mean: torch.Tensor
    """(num_kv_heads, D)"""
    value_mean: torch.Tensor
    """(num_kv_heads, D)"""
    key_reader: torch.Tensor
    """(num_kv_heads, D), positive: what an error of each element of a key does to scores."""
    value_reader: torch.Tensor
    """(num_kv_heads, D), positive: what an error of each element of a value does to outputs."""

    def of_heads(self, heads: slice) -> LayerBasis:
        """The same of some of the KV heads."""
        return LayerBasis(*(tensor[heads] for tensor in self))


@dataclass(frozen=True)
class Basis:
    """Contiguous matrices of one layer, (D, D) or (num_kv_heads, D, D), means (num_kv_heads, D).

    None where nothing changes.

    Attributes:
        key: what keys are multiplied with before they are stored.
        query: what queries are multiplied with.
        value: what values are multiplied with before they are stored.
        output: what the attention output is multiplied with.
        key_mean: what is taken off keys before that.
        value_mean: what is taken off values before that, and added to the output after it.
        key_feedback: how rounding keys passes errors on, (num_kv_heads, D, D), see
            :mod:`vllm_sparsekv.format.feedback`.
        value_feedback: the same for values.
    """

    key: torch.Tensor | None = None
    query: torch.Tensor | None = None
    value: torch.Tensor | None = None
    output: torch.Tensor | None = None
    key_mean: torch.Tensor | None = None
    value_mean: torch.Tensor | None = None
    key_feedback: torch.Tensor | None = None
    value_feedback: torch.Tensor | None = None

    @classmethod
    @cache
    def of(cls, fmt: SparseFormat, device: torch.device | str = "cpu") -> Basis:
        """The basis of all layers with this format that are not calibrated, on ``device``."""
        matrices = rotation(fmt.head_size)
        dtype = torch.float16
        if torch.device(device).type != "cpu":
            exact = all(torch.equal(matrix.to(fmt.dtype).float(), matrix) for matrix in matrices)
            dtype = fmt.dtype if exact else torch.float32
        forward, inverse = (matrix.to(device, dtype).contiguous() for matrix in matrices)
        key, query = (forward, inverse.mT.contiguous()) if fmt.key.rotated else (None, None)
        value, output = (forward, inverse) if fmt.value.rotated else (None, None)
        return cls(key, query, value, output)

    @classmethod
    def calibrated(
        cls, fmt: SparseFormat, layer: LayerBasis, device: torch.device | str = "cpu"
    ) -> Basis:
        """The same in a basis of the layer's own, for integer keys and values.

        Rounded to float16 on CPUs, where they are read from memory at every step, elsewhere to the
        model dtype, whose multiplications are fast there. The inverse is that of the rounded
        matrix, so that only its own rounding changes a score: by at most u times
        ``|k| |F| |F^-1| |q|``, all elements taken absolute, u the unit roundoff. Singular values
        within 1 / 100 .. 100 keep float16 far from overflow. Means are rounded to the model dtype,
        so that taking a large one off a vector near it is exact.

        Args:
            fmt: format of the layer.
            layer: its basis, on the CPU.
            device: where the result lies.
        """
        on_cpu = torch.device(device).type == "cpu"
        dtype, mean_dtype = (torch.float16, torch.float32) if on_cpu else (fmt.dtype, fmt.dtype)
        key, to_query = _calibrated(fmt.key, layer.key, device, dtype)
        value, output = _calibrated(fmt.value, layer.value, device, dtype)
        key_mean, value_mean = (
            mean.to(fmt.dtype).to(device, mean_dtype)
            if vector.codec.integer and mean.any()
            else None
            for vector, mean in ((fmt.key, layer.key_mean), (fmt.value, layer.value_mean))
        )
        return cls(
            key,
            None if to_query is None else to_query.mT.contiguous(),
            value,
            output,
            key_mean,
            value_mean,
            _feedback(fmt.key, layer.key_reader, device, dtype),
            _feedback(fmt.value, layer.value_reader, device, dtype),
        )

    def stored_key(self, key: torch.Tensor) -> torch.Tensor:
        """(..., num_kv_heads, D) -> the same in the basis."""
        return change(key, self.key, minus=self.key_mean)

    def stored_value(self, value: torch.Tensor) -> torch.Tensor:
        """(..., num_kv_heads, D) -> the same in the basis."""
        return change(value, self.value, minus=self.value_mean)

    def asked(self, query: torch.Tensor) -> torch.Tensor:
        """(..., num_heads, D) -> what is multiplied with stored keys."""
        return change(query, self.query)

    def restored(self, output: torch.Tensor) -> torch.Tensor:
        """(..., num_heads, D), averages of stored values -> averages of the values."""
        return change(output, self.output, plus=self.value_mean)


def _calibrated(
    vector: VectorFormat, matrices: torch.Tensor, device: torch.device | str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """What vectors are multiplied with, (num_kv_heads, D, D), and its inverse."""
    if not vector.codec.integer:
        return None, None
    forward = matrices.double()
    if vector.rotated:
        forward = forward @ _rotation_of_bands(vector)[0]
    forward = forward.to(dtype)
    inverse = torch.linalg.inv(forward.double()).to(dtype)
    return forward.to(device), inverse.to(device).contiguous()


def _feedback(
    vector: VectorFormat, reader: torch.Tensor, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor | None:
    """Of whole integer vectors; elements of a basis that is not rotated are read independently."""
    if not (vector.codec.integer and vector.rotated):
        return None
    _, inverse = _rotation_of_bands(vector)
    return feedback_matrix(inverse @ reader.double().diag_embed() @ inverse.mT).to(device, dtype)


def _rotation_of_bands(vector: VectorFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a calibrated vector's bands each by itself, (D, D) float64, and its inverse."""
    bands = vector.codec.bands
    forward, inverse = rotation(vector.head_size // bands)
    return (
        torch.block_diag(*[forward.double()] * bands),
        torch.block_diag(*[inverse.double()] * bands),
    )


def change(
    x: torch.Tensor,
    matrix: torch.Tensor | None,
    minus: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(x - minus) @ matrix + plus`` in the dtype of x; x itself where all are None.

    Args:
        x: (..., heads, D) floats; ``heads / num_kv_heads`` neighbours share what one KV head has.
        matrix: (D, D), (num_kv_heads, D, D) or None.
        minus, plus: (num_kv_heads, D), beside a matrix per KV head, or None.
    """
    if matrix is None:
        return x
    wider = torch.promote_types(x.dtype, matrix.dtype)
    if x.device.type == "cpu":
        wider = torch.promote_types(wider, torch.float32)
    y, matrix = x.to(wider), matrix.to(wider)
    if matrix.ndim == 2:
        return (y @ matrix).to(x.dtype).contiguous()
    y = y.unflatten(-2, (len(matrix), -1))
    if minus is not None:
        y = y - minus.unsqueeze(-2)
    y = torch.einsum("...hgd,hde->...hge", y, matrix)
    if plus is not None:
        y = y + plus.unsqueeze(-2)
    return y.flatten(-3, -2).to(x.dtype).contiguous()


def kv_heads_of_rank(num_kv_heads: int, rank: int, size: int) -> slice:
    """The KV heads that a tensor-parallel rank holds, of all ``num_kv_heads``.

    A contiguous share; where there are more ranks than heads, neighbours hold the same head.
    """
    first = rank * num_kv_heads // size
    return slice(first, first + max(1, num_kv_heads // size))


@cache
def rotation(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """F and its inverse, (size, size) float32: random signs, then a Hadamard transform.

    Where size is a power of two, F is orthogonal up to a factor that makes all entries of both
    matrices powers of two, exact in every dtype. An odd factor of size takes a cosine transform.
    """
    power = size & -size
    with torch.device("cpu"):
        matrix = _cosine(size // power)
        while matrix.shape[0] < size:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        signs = torch.randint(2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    bits = power.bit_length() - 1
    return signs * matrix / 2 ** (bits // 2), (signs * matrix).mT / 2 ** (bits - bits // 2)


def _cosine(size: int) -> torch.Tensor:
    """(size, size) float32, the orthonormal DCT-II."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = (math.pi / size * (n + 0.5) * n[:, None]).cos() * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
