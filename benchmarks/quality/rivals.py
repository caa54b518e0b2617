"""What vectors read back as in the formats of others.

Each is written from its paper or from a description of its format, and takes (num_kv_heads, tokens,
D) floats to float32 of the same shape. Rotations are one signed Hadamard transform for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch

Vectors = torch.Tensor
"""(num_kv_heads, tokens, D)"""

KVARN_TILE = 128
"""Tokens that KVarN quantises together, and first tokens of a text that it leaves alone."""


def fp8(x: Vectors) -> Vectors:
    """float8 e4m3, scale 1: vLLM's ``kv_cache_dtype="fp8"`` without calibration."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def int8(x: Vectors) -> Vectors:
    """Symmetric int8 with one scale per token and head: vLLM's ``int8_per_token_head``."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def min_max(x: Vectors, bits: int) -> Vectors:
    """Asymmetric integers between the minimum and the maximum, both scales float16."""
    x = x.float()
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    return low + ((x - low) / step).round().clamp(0, 2**bits - 1) * step


def rotated(quantise: Callable[[Vectors], Vectors], x: Vectors) -> Vectors:
    """Quantise in a randomly signed Hadamard basis."""
    basis = hadamard(x.shape[-1])
    return quantise(x.float() @ basis) @ basis.T


@cache
def hadamard(size: int) -> torch.Tensor:
    """(size, size) orthogonal: random signs, then the Hadamard transform.

    Raises:
        ValueError: ``size`` is not a power of two.
    """
    if size & (size - 1):
        raise ValueError(f"head_size={size}: a Hadamard rotation needs a power of two")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return signs.unsqueeze(1) * matrix / size**0.5


@cache
def lloyd_max(bits: int) -> torch.Tensor:
    """(2 ** bits,) levels that minimise the squared error of a standard normal, ascending."""
    grid = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    weight = (-grid.square() / 2).exp()
    levels = torch.linspace(-2.5, 2.5, 2**bits, dtype=torch.float64)
    for _ in range(500):
        cell = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, cell, weight)
        levels = torch.zeros_like(levels).index_add_(0, cell, weight * grid) / mass
    return levels.float()


def turboquant(x: Vectors, bits: int, unit: bool = False) -> Vectors:
    """TurboQuant (arXiv 2504.19874), the MSE quantiser: rotate, Lloyd-Max per coordinate.

    The norm is stored beside the codes (float16, 2 bytes). ``unit`` is vLLM's norm correction: what
    the codes stand for is scaled to length 1 before it takes the norm.
    """
    size = x.shape[-1]
    levels = lloyd_max(bits)

    def quantise(y: Vectors) -> Vectors:
        norm = y.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-7)
        code = torch.bucketize(y / norm * size**0.5, (levels[1:] + levels[:-1]) / 2)
        direction = levels[code]
        length = direction.norm(dim=-1, keepdim=True) if unit else size**0.5
        return direction * norm / length

    return rotated(quantise, x)


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of the sixteen FP4 numbers, 0 to 6 in size."""
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return levels[torch.bucketize(x.abs().contiguous(), (levels[1:] + levels[:-1]) / 2)].copysign(x)


def nvfp4(x: Vectors) -> Vectors:
    """FP4 with an e4m3 scale for each 16 elements, and no scale of the whole tensor."""
    groups = x.float().unflatten(-1, (-1, 16))
    scale = fp8(groups.abs().amax(-1, keepdim=True) / 6)
    return (e2m1(groups / scale.clamp_min(1e-9)) * scale).flatten(-2)


def mxfp4(x: Vectors) -> Vectors:
    """UltraQuant in vLLM: FP4, for each 32 a power of two near 0.156 of the largest as scale."""
    groups = x.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    scale = ((0.156 * largest).log2() + 0.5).floor().exp2()
    return (e2m1(groups / scale) * scale).flatten(-2)


def kvarn(x: Vectors, bits: int, axis: int) -> Vectors:
    """KVarN (arXiv 2606.03458): rotated tiles of tokens, their rows and columns of equal variance.

    Integers are asymmetric; the scales of both axes and the zero points are float16. The first tile
    and an unfinished last one stay as they are, as in its vLLM backend.

    Args:
        bits: of an integer.
        axis: what minimum and maximum are taken over: -2, tokens, of keys; -1, channels, of values.
    """

    def quantise(y: Vectors) -> Vectors:
        tiles = y.unflatten(1, (-1, KVARN_TILE))
        outer, inner = _balance(tiles, axis)
        balanced = tiles / (outer * inner)
        low, high = balanced.aminmax(dim=axis, keepdim=True)
        step = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
        code = ((balanced - low) / step).round()
        step, low, inner = (scale.half().float() for scale in (step * outer, low * outer, inner))
        return ((low + code * step) * inner).flatten(1, 2)

    x = x.float()
    end = x.shape[1] // KVARN_TILE * KVARN_TILE
    if end <= KVARN_TILE:
        return x
    whole = rotated(quantise, x[:, KVARN_TILE:end])
    return torch.cat([x[:, :KVARN_TILE], whole, x[:, end:]], 1)


def _balance(tiles: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of tiles along both axes, by which all rows and columns have nearly one deviation.

    Both are divided by their deviations in turn, 16 times, of which the most even counts. Where
    means are large that drifts, so scales keep within the bounds of the method's vLLM backend.

    Args:
        tiles: (..., tokens, D) float32.
        axis: -1 or -2.

    Returns:
        scales of size 1 along ``axis``, and along the other one.
    """
    other = -3 - axis

    def next_scale(scale: torch.Tensor, both: torch.Tensor, along: int) -> torch.Tensor:
        deviation = (tiles / both).std(along, keepdim=True).clamp(1e-3, 1e3)
        return (scale * deviation).clamp(math.exp(-0.3), math.exp(10))

    def unevenness(both: torch.Tensor) -> torch.Tensor:
        deviations = ((tiles / both).std(along, keepdim=True) for along in (axis, other))
        return sum(
            x.amax((-1, -2), True) / x.amin((-1, -2), True).clamp_min(1e-8) for x in deviations
        )

    outer = torch.ones_like(tiles.mean(axis, keepdim=True))
    inner = torch.ones_like(tiles.mean(other, keepdim=True))
    best, least = (outer, inner), unevenness(outer * inner)
    for _ in range(16):
        inner = next_scale(inner, outer * inner, other)
        outer = next_scale(outer, outer * inner, axis)
        found = unevenness(outer * inner)
        better = found <= least
        best = tuple(
            torch.where(better, new, old) for new, old in zip((outer, inner), best, strict=True)
        )
        least = torch.minimum(found, least)
    return best
