"""KV-cache methods under one interface: what a cached key or value becomes, and what it costs.

Every method sees the same dense window. Ours go through the project's pack and unpack, those of
others through :mod:`quality.rivals` and :mod:`quality.policies`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from quality.eviction import HeavyHitters
from quality.policies import WINDOW, Magnitude, OutputAware, PerChannel, Policy, Think, TwoOfFour
from quality.rivals import (
    KVARN_TILE,
    fp8,
    int8,
    kvarn,
    min_max,
    mxfp4,
    nvfp4,
    rotated,
    turboquant,
)
from vllm_sparsekv.format.basis import Basis, change
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.format.window import TAG_BYTES, from_int8, to_int8
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors
from vllm_sparsekv.settings import PRESETS, SparseKVConfig

CALIBRATED = "-calibrated"
"""How the name of a row ends that is stored in a calibrated basis."""

Vectors = torch.Tensor
"""(num_kv_heads, tokens, D) in the cache dtype of the dense baseline."""


@dataclass(frozen=True)
class Shape:
    """What of a model a cache depends on."""

    head_size: int
    num_kv_heads: int
    num_layers: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """That of a Hugging Face model; layers of several head sizes count as the usual one."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return cls(
            getattr(text, "head_dim", None) or text.hidden_size // heads,
            getattr(text, "num_key_value_heads", None) or heads,
            text.num_hidden_layers,
        )


@dataclass(frozen=True)
class Method:
    """One cache.

    Attributes:
        key: what cached keys read back as; also gets the queries (num_heads, tokens, D).
        value: what cached values read back as.
        vector_bytes: bytes of one key plus one value vector of one KV head.
        window: newest tokens that stay whole.
        held: what keys and values of the window read back as where they are not dense.
        slot_bytes: of one token and KV head there; None for those of a dense one.
        evaluation_only: true where the method cannot serve (it looks at the whole prompt).
        settings: the user's settings where the method is ours.
        layers: the method of each layer where they differ.
        sinks: first tokens of a text that stay dense as well, which ``key`` and ``value`` know.
        eviction: which tokens leave; what stays is a share of the text.
    """

    key: Callable[[Vectors, torch.Tensor], Vectors]
    value: Callable[[Vectors], Vectors]
    vector_bytes: float
    window: int
    evaluation_only: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    layers: tuple[Method, ...] = ()
    sinks: int = 0
    eviction: HeavyHitters | None = None
    held: Callable[[Vectors, Vectors], tuple[Vectors, Vectors]] | None = None
    slot_bytes: int | None = None

    def token_bytes(self, dense_bytes: int, context: int) -> float:
        """Bytes a token and KV head, the window's bytes spread over ``context`` tokens.

        Args:
            dense_bytes: one key plus one value vector, unpruned.
            context: tokens of the request.
        """
        if self.layers:
            sizes = [layer.token_bytes(dense_bytes, context) for layer in self.layers]
            return sum(sizes) / len(sizes)
        window = self.window * (self.slot_bytes or dense_bytes + TAG_BYTES) / context
        sinks = self.sinks * (dense_bytes - self.vector_bytes) / context
        share = self.eviction.share if self.eviction else 1
        return self.vector_bytes * share + window + sinks

    def codec(self, shape: Shape, dtype: torch.dtype) -> str:
        """8 hexadecimal digits that change with the code or the format of a method.

        They stand for its bytes and for the squared errors of vectors that are always the same,
        to four digits: the last bits of a float depend on the machine.
        """
        generator = torch.Generator().manual_seed(0)
        sizes = (2, shape.num_kv_heads, 2 * KVARN_TILE, shape.head_size)
        x = torch.randn(sizes, generator=generator) * torch.linspace(0.25, 2, shape.head_size)
        key, value = x.to(dtype)
        layers = self.layers or (self,)
        errors = (
            sum((cached - exact.float()).square().sum().item() for cached in read)
            for exact, read in (
                (key, [layer.key(key, key) for layer in layers]),
                (value, [layer.value(value) for layer in layers]),
            )
        )
        facts = [self.vector_bytes, self.window, self.sinks, *(f"{x:.3e}" for x in errors)]
        if self.eviction:
            facts.append(self.eviction)
        if self.held:
            held = zip((key, value), self.held(key, value), strict=True)
            errors = sum((read - exact.float()).square().sum().item() for exact, read in held)
            facts += [self.slot_bytes, f"{errors:.3e}"]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


DENSE = Method(lambda key, query: key.float(), torch.Tensor.float, 0, 0)
"""What every method is compared with."""


def sparse(config: SparseKVConfig, head_size: int, dtype: torch.dtype) -> Method:
    """Ours: keys and values through the project's own pack and unpack.

    Without a basis file vectors are stored as in a model that could not be calibrated.

    Raises:
        ValueError: the configured basis is not a basis file or of another head size.
    """
    fmt = SparseFormat.from_config(config, head_size, dtype)
    settings = {
        name: value
        for name, value in asdict(config).items()
        # Which layers are skipped, no evaluation here knows.
        if name not in ("skip_layers", "basis", "basis_sha256")
    }
    if config.basis_path is None:
        return _stored(fmt, Basis.of(fmt), settings)
    file = BasisFile.open(config.basis_path)
    sizes = {size for _, size in file.shapes.values()}
    if sizes != {head_size}:
        raise ValueError(f"{file.path}: head sizes {sorted(sizes)}, must be {head_size}")
    settings["basis"] = file.sha256[:16]
    layers = tuple(
        _stored(fmt, Basis.calibrated(fmt, file.layer(index)), settings)
        for index in range(file.num_layers)
    )
    return replace(layers[0], layers=layers)


def as_served(config: SparseKVConfig, head_size: int, dtype: torch.dtype) -> SparseKVConfig:
    """The same with the window of an engine, which fills the blocks it takes."""
    fmt = SparseFormat.from_config(config, head_size, dtype)
    return replace(config, window=fmt.with_full_ring(fmt.default_block_size).window)


def _stored(fmt: SparseFormat, basis: Basis, settings: dict[str, Any]) -> Method:
    """What vectors read back as in one layer."""

    def restored_key(stored: torch.Tensor) -> Vectors:
        back = None if basis.query is None else basis.query.mT
        return change(stored, back, plus=basis.key_mean).transpose(0, 1)

    def restored_value(stored: torch.Tensor) -> Vectors:
        return basis.restored(stored).transpose(0, 1)

    def key(x: Vectors, query: torch.Tensor) -> Vectors:
        packed = pack_vectors(basis.stored_key(x.transpose(0, 1)), fmt.key, basis.key_feedback)
        return restored_key(unpack_vectors(*packed, fmt.key))

    def value(x: Vectors) -> Vectors:
        stored = basis.stored_value(x.transpose(0, 1))
        packed = pack_vectors(stored, fmt.value, basis.value_feedback)
        return restored_value(unpack_vectors(*packed, fmt.value))

    def held(k: Vectors, v: Vectors) -> tuple[Vectors, Vectors]:
        stored_key, stored_value = (
            from_int8(*to_int8(x))
            for x in (basis.stored_key(k.transpose(0, 1)), basis.stored_value(v.transpose(0, 1)))
        )
        return restored_key(stored_key), restored_value(stored_value)

    return Method(
        key=key,
        value=value,
        vector_bytes=fmt.token_bytes,
        window=fmt.window,
        settings=settings,
        held=held if fmt.window_dtype == torch.int8 else None,
        slot_bytes=fmt.slot_bytes,
    )


def edges_dense(method: Method, num_layers: int, dense_bytes: int, edge: int = 2) -> Method:
    """The same with the first and last ``edge`` layers dense, at most all of them."""
    edge = min(edge, num_layers // 2)
    dense = replace(DENSE, vector_bytes=dense_bytes)
    layers = (dense,) * edge + (method,) * (num_layers - 2 * edge) + (dense,) * edge
    mean = sum(layer.vector_bytes for layer in layers) / num_layers
    return replace(method, vector_bytes=mean, layers=layers)


def build_methods(
    shape: Shape, dtype: torch.dtype, window: int = 64, basis: Path | None = None
) -> dict[str, Method]:
    """All rows of the comparison.

    Args:
        shape: of the model.
        dtype: cache dtype of the dense baseline and of every method's window.
        basis: file of ``sparsekv-calibrate``; adds each preset in it, and a few rows more.
        window: the dense window of the rivals; those that prune use the 32 of Mustafar and ThinK.
            Rows of :mod:`quality.policies` cost what a bitmap and 16-bit survivors would.
    """
    dense_bytes = 2 * shape.head_size * dtype.itemsize
    dense = replace(DENSE, vector_bytes=dense_bytes)
    ours = _ours(shape.head_size, dtype, basis)
    return {
        "dense": dense,
        **_quantised(shape, dense_bytes, window),
        **_pruned(shape.head_size, dtype),
        **ours,
        "h2o-20": _evicting(dense),
        **{f"h2o-20-{name}": _evicting(ours[name]) for name in ON_TOP_OF if name in ours},
    }


ON_TOP_OF = ("sparsekv-sparse-50", f"sparsekv-balanced{CALIBRATED}")
"""What is measured with tokens leaving as well."""


def _evicting(method: Method) -> Method:
    """The same with a fifth of all tokens left, half of them the newest, as Mustafar has it."""
    eviction = HeavyHitters(0.1, 0.1)
    layers = tuple(replace(layer, eviction=eviction) for layer in method.layers)
    return replace(method, layers=layers, eviction=eviction, evaluation_only=True)


def _quantised(shape: Shape, dense_bytes: int, window: int) -> dict[str, Method]:
    """Rivals that keep every element.

    Names of vLLM's cache dtypes, with underscores, are what vLLM runs under them: of TurboQuant and
    UltraQuant all but the first and last two layers.
    """
    size = shape.head_size

    def pair(
        key: Callable[[Vectors], Vectors],
        value: Callable[[Vectors], Vectors],
        bits: float,
        scales: float,
    ) -> Method:
        """``bits`` of one element of both, ``scales`` bytes of both."""
        return Method(lambda x, query: key(x), value, size * bits / 8 + scales, window)

    def as_shipped(method: Method) -> Method:
        return edges_dense(method, shape.num_layers, dense_bytes)

    int4 = partial(min_max, bits=4)
    turbo4, turbo3 = (partial(turboquant, bits=bits) for bits in (4, 3))
    kvarn_scales = (3 * size + 3 * KVARN_TILE) * 2 / KVARN_TILE
    return {
        "fp8": pair(fp8, fp8, 16, 0),
        "int8-token-head": pair(int8, int8, 16, 8),
        "int4-token-head": pair(partial(rotated, int4), partial(rotated, int4), 8, 8),
        "int4-plain": pair(int4, int4, 8, 8),
        "turboquant-4": pair(turbo4, turbo4, 8, 4),
        "turboquant-3": pair(turbo3, turbo3, 6, 4),
        "turboquant-k4v3": pair(turbo4, turbo3, 7, 4),
        "turboquant_k8v4": as_shipped(pair(fp8, int4, 12, 4)),
        "turboquant_4bit_nc": as_shipped(pair(partial(turbo4, unit=True), int4, 8, 6)),
        "turboquant_3bit_nc": as_shipped(
            pair(partial(turbo3, unit=True), partial(min_max, bits=3), 6, 6)
        ),
        "ultraquant_4bit": as_shipped(pair(partial(rotated, mxfp4), mxfp4, 8, size / 16)),
        "nvfp4": pair(nvfp4, nvfp4, 8, size / 8),
        "kvarn_k4v2_g128": replace(
            pair(partial(kvarn, bits=4, axis=-2), partial(kvarn, bits=2, axis=-1), 6, kvarn_scales),
            sinks=KVARN_TILE,
        ),
    }


def _pruned(head_size: int, dtype: torch.dtype) -> dict[str, Method]:
    """Rivals that prune; survivors have 16 bits."""
    half = head_size // 2
    packed_bytes = head_size // 8 + half * dtype.itemsize

    def pruned(
        key: Policy, value: Policy | None, size: int, evaluation_only: bool = True
    ) -> Method:
        def read_value(x: Vectors) -> Vectors:
            return x.float() * (value.survivors(x, None) if value else 1)

        return Method(
            lambda k, query: k.float() * key.survivors(k, query),
            read_value,
            size,
            WINDOW,
            evaluation_only,
        )

    return {
        "think-50": pruned(Think(half), None, (half + head_size) * dtype.itemsize),
        "output-aware-50": pruned(OutputAware(half), Magnitude(half), 2 * packed_bytes),
        "per-channel-50": pruned(PerChannel(0.5), PerChannel(0.5), 2 * packed_bytes),
        "2-of-4": pruned(TwoOfFour(), TwoOfFour(), 2 * packed_bytes, evaluation_only=False),
        **{
            f"mustafar-{percent}": sparse(
                SparseKVConfig(percent / 100, percent / 100, "auto", "auto", WINDOW, "auto"),
                head_size,
                dtype,
            )
            for percent in (50, 70)
        },
    }


def _ours(head_size: int, dtype: torch.dtype, basis: Path | None) -> dict[str, Method]:
    """Presets and other settings, and those that a calibrated basis is for."""

    def ours(**settings: Any) -> Method:
        config = as_served(SparseKVConfig.from_dict(settings), head_size, dtype)
        return sparse(config, head_size, dtype)

    calibrated = {
        f"sparsekv-{name}{CALIBRATED}": ours(**settings, basis=str(basis))
        for name, settings in (
            *((name, {"preset": name}) for name in PRESETS if _is_integer(PRESETS[name])),
            (
                "capacity-window-16-bit",
                {"preset": "capacity", "window": 64, "window_dtype": "auto"},
            ),
            ("int4_int2-int3", {"key_dtype": "int4_int2"}),
            ("int3-int3", {"key_dtype": "int3", "value_dtype": "int3"}),
            ("pruned", {"key_sparsity": 0.5, "key_dtype": "int4", "value_dtype": "int3"}),
        )
        if basis and not (head_size % 32 and _needs_bands(settings))
    }
    plain = {
        **{name: {"preset": name} for name in PRESETS},
        "50-auto": _settings(0.5, 0.5, "auto"),
        "30-50-int4": _settings(0.3, 0.5, "int4"),
    }
    plain = {f"sparsekv-{name}": ours(**settings, basis="none") for name, settings in plain.items()}
    return plain | calibrated


def _settings(key_sparsity: float, value_sparsity: float, dtype: str) -> dict[str, Any]:
    sparsity = {"key_sparsity": key_sparsity, "value_sparsity": value_sparsity}
    return sparsity | {"key_dtype": dtype, "value_dtype": dtype}


def _needs_bands(settings: dict[str, Any]) -> bool:
    return SparseKVConfig.from_dict(settings).key_dtype == "int4_int2"


def _is_integer(settings: dict[str, Any]) -> bool:
    return SparseKVConfig.from_dict(settings).takes_basis
