"""KV-cache methods under one interface: what a cached key or value becomes, and what it costs.

Every method sees the same dense window. A method that needs its own encoder here is written from
its paper or from vLLM's description of the format; ours goes through the project's pack and unpack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from quality.policies import WINDOW, Magnitude, OutputAware, PerChannel, Policy, Think
from vllm_sparsekv.format.basis import Basis, change
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.layout import TAG_BYTES, SparseFormat, VectorFormat
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors
from vllm_sparsekv.settings import PRESETS, SparseKVConfig

CALIBRATED = "-calibrated"
"""How the name of a row ends that is stored in a calibrated basis."""

Vectors = torch.Tensor
"""(num_kv_heads, tokens, D) in the cache dtype of the dense baseline."""


@dataclass(frozen=True)
class Method:
    """One cache.

    Attributes:
        key: what cached keys read back as; also gets the queries (num_heads, tokens, D).
        value: what cached values read back as.
        vector_bytes: bytes of one key plus one value vector of one KV head.
        window: newest tokens that stay dense.
        evaluation_only: true where the method cannot serve (it looks at the whole prompt).
        settings: the user's settings where the method is ours.
        layers: the method of each layer where they differ; only ``key`` and ``value`` count.
    """

    key: Callable[[Vectors, torch.Tensor], Vectors]
    value: Callable[[Vectors], Vectors]
    vector_bytes: float
    window: int
    evaluation_only: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    layers: tuple[Method, ...] = ()

    def token_bytes(self, dense_bytes: int, context: int) -> float:
        """Bytes a token and KV head, the window's bytes spread over ``context`` tokens.

        Args:
            dense_bytes: one key plus one value vector, unpruned.
            context: tokens of the request.
        """
        return self.vector_bytes + self.window * (dense_bytes + TAG_BYTES) / context


DENSE = Method(lambda key, query: key.float(), torch.Tensor.float, 0, 0)
"""What every method is compared with."""


def sparse(config: SparseKVConfig, head_size: int, dtype: torch.dtype) -> Method:
    """Ours: keys and values through the project's own pack and unpack.

    Raises:
        ValueError: the configured basis is not a basis file or of another head size.
    """
    fmt = SparseFormat.from_config(config, head_size, dtype)
    # Which layers are skipped, no evaluation here knows.
    settings = {name: value for name, value in asdict(config).items() if value is not None}
    del settings["skip_layers"]
    if config.basis is None:
        return _stored(fmt, Basis.of(fmt), settings)
    file = BasisFile.open(config.basis)
    if file.head_size != head_size:
        raise ValueError(f"{file.path}: head_size {file.head_size}, must be {head_size}")
    settings["basis"] = hashlib.sha256(file.path.read_bytes()).hexdigest()[:16]
    layers = tuple(
        _stored(fmt, Basis.calibrated(fmt, file.layer(index)), settings)
        for index in range(file.num_layers)
    )
    return replace(layers[0], layers=layers)


def _stored(fmt: SparseFormat, basis: Basis, settings: dict[str, Any]) -> Method:
    """What vectors read back as in one layer."""

    def read_back(
        vector: VectorFormat, there: torch.Tensor | None, back: torch.Tensor | None, x: Vectors
    ) -> Vectors:
        packed = pack_vectors(change(x.transpose(0, 1), there), vector)
        return change(unpack_vectors(*packed, vector), back).transpose(0, 1)

    key_back = None if basis.query is None else basis.query.mT
    return Method(
        key=lambda key, query: read_back(fmt.key, basis.key, key_back, key),
        value=partial(read_back, fmt.value, basis.value, basis.output),
        vector_bytes=fmt.token_bytes,
        window=fmt.window,
        settings=settings,
    )


def _fp8(x: Vectors) -> Vectors:
    """float8 e4m3, scale 1: vLLM's ``kv_cache_dtype="fp8"`` without calibration."""
    return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _int8(x: Vectors) -> Vectors:
    """Symmetric int8 with one scale per token and head: vLLM's ``int8_per_token_head``."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x / scale).round() * scale


def _min_max(x: Vectors, bits: int) -> Vectors:
    """Asymmetric integers between the minimum and the maximum, both scales float16."""
    x = x.float()
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-7)
    return low + ((x - low) / step).round().clamp(0, 2**bits - 1) * step


def _rotated(quantise: Callable[[Vectors], Vectors], x: Vectors) -> Vectors:
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


def _turboquant(x: Vectors, bits: int) -> Vectors:
    """TurboQuant (arXiv 2504.19874), the MSE quantiser: rotate, Lloyd-Max per coordinate.

    The norm is stored beside the codes (float16, 2 bytes); the rotation is a signed Hadamard.
    """
    size = x.shape[-1]
    levels = lloyd_max(bits)

    def quantise(y: Vectors) -> Vectors:
        norm = y.norm(dim=-1, keepdim=True).half().float().clamp_min(1e-7)
        code = torch.bucketize(y / norm * size**0.5, (levels[1:] + levels[:-1]) / 2)
        return levels[code] * norm / size**0.5

    return _rotated(quantise, x)


def build_methods(
    head_size: int, dtype: torch.dtype, window: int = 64, basis: Path | None = None
) -> dict[str, Method]:
    """All rows of the comparison.

    Args:
        head_size: D.
        dtype: cache dtype of the dense baseline and of every method's window.
        basis: file of ``sparsekv-calibrate``; adds each preset in it, and a few rows more.
        window: the dense window of the rivals; Mustafar and ThinK use the 32 of their papers.
            Rows of :mod:`quality.policies` cost what a bitmap and 16-bit survivors would.
    """

    def quantised(quantise: Callable[[Vectors], Vectors], bits: float, scale: int) -> Method:
        size = 2 * (head_size * bits / 8 + scale)
        return Method(lambda key, query: quantise(key), quantise, size, window)

    def ours(**settings: Any) -> Method:
        return sparse(SparseKVConfig.from_dict(settings), head_size, dtype)

    calibrated = {
        f"sparsekv-{name}{CALIBRATED}": ours(**settings, basis=str(basis))
        for name, settings in (
            *((name, {"preset": name}) for name in PRESETS),
            ("balanced-window-112", {"preset": "balanced", "window": 112}),
            ("int4_int2-int3", {"key_dtype": "int4_int2"}),
            ("int4_int2-int3-window-160", {"key_dtype": "int4_int2", "window": 160}),
            ("int4_int2-int2", {"key_dtype": "int4_int2", "value_dtype": "int2"}),
            ("pruned", {"key_sparsity": 0.5, "key_dtype": "int4", "value_dtype": "int3"}),
        )
        if basis and not (head_size % 32 and settings.get("key_dtype") == "int4_int2")
    }
    half = head_size // 2
    dense_bytes = 2 * head_size * dtype.itemsize
    packed_bytes = head_size // 8 + half * dtype.itemsize

    def pruned(key: Policy, value: Policy | None, size: int) -> Method:
        def read_value(x: Vectors) -> Vectors:
            return x.float() * (value.survivors(x, None) if value else 1)

        return Method(
            lambda k, query: k.float() * key.survivors(k, query), read_value, size, WINDOW, True
        )

    mustafar = {
        f"mustafar-{percent}": sparse(
            SparseKVConfig(percent / 100, percent / 100, "auto", "auto", WINDOW), head_size, dtype
        )
        for percent in (50, 70)
    }
    return {
        "dense": replace(DENSE, vector_bytes=dense_bytes),
        "fp8": quantised(_fp8, 8, 0),
        "int8-token-head": quantised(_int8, 8, 4),
        "int4-token-head": quantised(partial(_rotated, partial(_min_max, bits=4)), 4, 4),
        "int4-plain": quantised(partial(_min_max, bits=4), 4, 4),
        "turboquant-4": quantised(partial(_turboquant, bits=4), 4, 2),
        "turboquant-3": quantised(partial(_turboquant, bits=3), 3, 2),
        "turboquant-k4v3": Method(
            lambda key, query: _turboquant(key, 4),
            partial(_turboquant, bits=3),
            head_size * 7 / 8 + 4,
            window,
        ),
        "think-50": pruned(Think(half), None, (half + head_size) * dtype.itemsize),
        "output-aware-50": pruned(OutputAware(half), Magnitude(half), 2 * packed_bytes),
        "per-channel-50": pruned(PerChannel(0.5), PerChannel(0.5), 2 * packed_bytes),
        **mustafar,
        **{f"sparsekv-{name}": ours(preset=name) for name in PRESETS},
        **calibrated,
    }
