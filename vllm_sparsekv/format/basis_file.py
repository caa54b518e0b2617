"""The file of calibrated bases that ``sparsekv-calibrate`` writes, in safetensors format.

It holds six float32 tensors for each calibrated decoder layer (:class:`LayerBasis`):
``layers.<index>.key`` and ``.value``, (num_kv_heads, D, D), what the post-RoPE keys and the values
of each KV head are multiplied with, ``.key_mean`` and ``.value_mean``, (num_kv_heads, D), what is
taken off them before, and ``.key_reader`` and ``.value_reader``, (num_kv_heads, D), how much what
reads them depends on each element. The header's metadata say what it is for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_sparsekv.format.basis import LayerBasis

KIND = "vllm_sparsekv basis"
VERSION = "4"
LARGEST_SIZE = 200.0
"""Of a singular value, and 1 / it the smallest: calibration keeps within half of that."""

LARGEST_RATIO = 1e8
"""Of what reads the elements of a vector."""


@dataclass(frozen=True)
class BasisFile:
    """The header of a file of bases.

    Attributes:
        path: where it is.
        model: the model it was calibrated on, for people.
        num_layers: decoder layers of the whole model.
        shapes: (KV heads of the whole model, head size) of each calibrated layer, by its index.
    """

    path: Path
    model: str
    num_layers: int
    shapes: Mapping[int, tuple[int, int]]

    @classmethod
    def open(cls, path: str | Path, sha256: str | None = None) -> BasisFile:
        """Read the header.

        Args:
            path: of the file.
            sha256: what the file must have, None for any.

        Raises:
            ValueError: no such file, not one of ours or another one than wanted; names the setting
                and the path.
        """
        wanted = f"sparsekv.basis={str(path)!r}: must be a file written by sparsekv-calibrate"
        if not Path(path).is_file():
            raise ValueError(f"{wanted}, there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{wanted} ({error})") from error
        if metadata.get("kind") != KIND:
            raise ValueError(f"{wanted}, this is another safetensors file")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{wanted} of version {VERSION}, this is version {metadata.get('version')}"
            )
        if not metadata.get("num_layers", "").isdecimal():
            raise ValueError(f"{wanted}, its metadata have no number 'num_layers'")
        num_layers = int(metadata["num_layers"])
        shapes = {}
        for index in range(num_layers):
            key = found.get(_names(index)[0], ())
            if len(key) == 3:
                shapes[index] = (key[0], key[1])
        expected = {
            name: list(shape)
            for index, sizes in shapes.items()
            for name, shape in zip(_names(index), _shapes(*sizes), strict=True)
        }
        if not shapes or found != expected:
            raise ValueError(f"{wanted}, layers are missing or of wrong shapes")
        basis = cls(Path(path), metadata.get("model", ""), num_layers, shapes)
        if sha256 not in (None, basis.sha256):
            raise ValueError(
                f"sparsekv.basis={str(path)!r}: has sha256 {basis.sha256}, must be {sha256} as "
                f"where the engine was started"
            )
        return basis

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, hexadecimal."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def layer(self, index: int) -> LayerBasis:
        """Basis of one layer, float32.

        Raises:
            ValueError: the file has no such layer.
        """
        if index not in self.shapes:
            raise ValueError(
                f"sparsekv.basis={str(self.path)!r}: layer {index} is not one of its "
                f"{len(self.shapes)} layers"
            )
        with safe_open(self.path, framework="pt") as file:
            return LayerBasis(*(file.get_tensor(name) for name in _names(index)))

    def check(self) -> None:
        """Read every tensor and see that a cache can be stored in the bases.

        Raises:
            ValueError: a tensor of another dtype, or one that is not finite, singular or nearly so;
                names the file, the tensor and what is wrong.
        """
        for name, tensor in self._tensors():
            wrong = None
            if tensor.dtype != torch.float32:
                wrong = f"is {tensor.dtype}, must be torch.float32"
            elif not tensor.isfinite().all():
                wrong = "holds NaN or infinity"
            elif name.endswith("_reader"):
                if tensor.min() < 1 / LARGEST_RATIO * tensor.max() or tensor.min() <= 0:
                    wrong = (
                        f"holds {tensor.min():.3g} to {tensor.max():.3g}, must be positive and "
                        f"within a ratio of {LARGEST_RATIO:g}"
                    )
            elif tensor.ndim == 3:
                sizes = torch.linalg.svdvals(tensor)
                if sizes.min() < 1 / LARGEST_SIZE or sizes.max() > LARGEST_SIZE:
                    wrong = (
                        f"has singular values from {sizes.min():.3g} to {sizes.max():.3g}, "
                        f"must be within {1 / LARGEST_SIZE:g} to {LARGEST_SIZE:g}"
                    )
            if wrong:
                raise ValueError(f"sparsekv.basis={str(self.path)!r}: {name} {wrong}")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(self.path, framework="pt") as file:
            for index in self.shapes:
                for name in _names(index):
                    yield name, file.get_tensor(name)


def write_basis(
    path: str | Path, layers: Mapping[int, LayerBasis], num_layers: int, model: str
) -> None:
    """Write the bases of a model; the file is there whole or as it was before.

    Args:
        path: of the file.
        layers: by index of the decoder layer.
        num_layers: decoder layers of the whole model.
        model: its name, for people.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    metadata = {"kind": KIND, "version": VERSION, "model": model, "num_layers": str(num_layers)}
    tensors = {
        name: tensor.float().clone(memory_format=torch.contiguous_format)
        for index, layer in layers.items()
        for name, tensor in zip(_names(index), layer, strict=True)
    }
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _names(layer: int) -> list[str]:
    return [f"layers.{layer}.{kind}" for kind in LayerBasis._fields]


def _shapes(num_kv_heads: int, head_size: int) -> list[tuple[int, ...]]:
    matrix, mean = (num_kv_heads, head_size, head_size), (num_kv_heads, head_size)
    return [matrix, matrix, mean, mean, mean, mean]
