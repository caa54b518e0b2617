"""The basis that serves two moments at once: balance, then principal axes.

An error e in a key moves the score of a query q by ``q . e``. With S the second moment of the keys
of a KV head and R that of the queries of its group, the map T of :func:`balance` makes both the
same matrix (balanced coordinates as in model reduction, Moore 1981), so that a coordinate matters
to scores as much as it is large. Its eigenvectors then put as much as can be into few coordinates,
which is what pruning by magnitude wants, and a Hadamard rotation spreads it evenly, which is what
whole integer vectors want. Values and what reads them are balanced alike.
"""

from __future__ import annotations

import torch

from vllm_sparsekv.calibration.moments import Moments
from vllm_sparsekv.format.basis import LayerBasis

METHOD = "3"
"""Of everything that decides what a basis is: the text, the moments, the balance."""

RIDGE = 3e-2
"""Added to the diagonal of moments, in units of their median eigenvalue.

A few huge directions, as key biases make, say nothing about how well the others are known.
"""

LARGEST_CONDITION = 1e4
"""Of a matrix: the ratio of its largest to its smallest singular value."""

SMALLEST_READER = 1e-6
"""Of what reads a coordinate, in units of the one that is read most."""


def layer_basis(moments: Moments, centred: bool) -> LayerBasis:
    """The basis of one layer, float64.

    Args:
        moments: of the layer.
        centred: whether attention allows vectors to be stored less their mean, see
            :mod:`vllm_sparsekv.format.basis`. It is weighted as the moments are: what most of the
            attention goes to is then stored best.
    """
    key_mean, key = _about_mean(moments.key, moments.key_sum, moments.key_weight, centred)
    value_mean, value = _about_mean(moments.value, moments.value_sum, moments.value_weight, centred)
    key_basis = balanced_basis(key, moments.query)
    value_basis = balanced_basis(value, moments.output)
    return LayerBasis(
        key=key_basis,
        value=value_basis,
        key_mean=key_mean,
        value_mean=value_mean,
        key_reader=reader_of(key_basis, moments.query),
        value_reader=reader_of(value_basis, moments.output),
    )


def _about_mean(
    second: torch.Tensor, first: torch.Tensor, weight: torch.Tensor, centred: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean, (num_kv_heads, D), and second moment about it; about 0 if not ``centred``."""
    weight = weight.clamp_min(torch.finfo(weight.dtype).tiny)
    mean = first / weight[:, None] if centred else torch.zeros_like(first)
    return mean, second / weight[:, None, None] - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def balance(stored: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """The symmetric T with ``T S T^t == T^-t R T^-1``.

    T^t T is the geometric mean of R and S^-1 (Pusz and Woronowicz 1975).

    Args:
        stored: S, (..., D, D) float64, positive definite.
        reader: R, likewise.
    """
    root = _power(reader, 0.5)
    return _power(root @ _power(root @ stored @ root, -0.5) @ root, 0.5)


def balanced_basis(stored: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """What vectors are to be multiplied with, from the moments of one layer.

    Args:
        stored: (num_kv_heads, D, D) float64, moments of the vectors.
        reader: (num_kv_heads, D, D) float64, moments of what they are multiplied with later.

    Returns:
        (num_kv_heads, D, D) float64 of determinant +-1, condition at most
        :data:`LARGEST_CONDITION`: the balanced basis, most important coordinate first.
    """
    stored, reader = _with_ridge(stored), _with_ridge(reader)
    stretch, axes = torch.linalg.eigh(balance(stored, reader))
    bound = LARGEST_CONDITION**0.5
    stretch = (stretch / _geometric_mean(stretch)).clamp(1 / bound, bound)
    balanced = axes @ torch.diag_embed(stretch / _geometric_mean(stretch)) @ axes.mT
    _, principal = torch.linalg.eigh(balanced @ stored @ balanced)
    return balanced @ principal.flip(-1)


def reader_of(basis: torch.Tensor, reader: torch.Tensor) -> torch.Tensor:
    """How much each coordinate of a balanced basis is read, (num_kv_heads, D), positive.

    In such a basis that is all of the reader's moment; the smallest ones, of which little is known,
    are raised to :data:`SMALLEST_READER` of the largest.
    """
    inverse = torch.linalg.inv(basis)
    moment = (inverse @ _with_ridge(reader) @ inverse.mT).diagonal(dim1=-2, dim2=-1)
    moment = moment / moment.amax(-1, keepdim=True)
    return moment.clamp_min(SMALLEST_READER)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """A power of symmetric positive definite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag_embed(values**exponent) @ vectors.mT


def _with_ridge(moment: torch.Tensor) -> torch.Tensor:
    """A moment of nothing becomes that of white noise."""
    median = torch.linalg.eigvalsh(moment).median(-1).values[:, None, None]
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    # Of few samples more than half of the eigenvalues may be rounding errors.
    unit = torch.where(median > 1e-12 * mean, median, mean)
    unit = torch.where(unit > 0, unit, 1 / RIDGE)
    return moment + RIDGE * unit * torch.eye(moment.shape[-1], dtype=moment.dtype)


def _geometric_mean(x: torch.Tensor) -> torch.Tensor:
    return x.log().mean(-1, keepdim=True).exp()
