"""The file of calibrated bases that ``sparsekv-calibrate`` writes, in safetensors format.

It holds two tensors per decoder layer, ``layers.<index>.key`` and ``layers.<index>.value``, each
(num_kv_heads, D, D) float32: what the post-RoPE keys and the values of each KV head are multiplied
with. The header's metadata say what it is for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_sparsekv.format.basis import LayerMatrices

KIND = "vllm_sparsekv basis"
VERSION = "2"
LARGEST_SIZE = 200.0
"""Of a singular value, and 1 / it the smallest: calibration keeps within half of that."""


@dataclass(frozen=True)
class BasisFile:
    """The header of a file of bases.

    Attributes:
        path: where it is.
        model: the model it was calibrated on, for people.
        head_size: D.
        num_layers: decoder layers of the whole model.
        num_kv_heads: KV heads of the whole model.
    """

    path: Path
    model: str
    head_size: int
    num_layers: int
    num_kv_heads: int

    @classmethod
    def open(cls, path: str | Path) -> BasisFile:
        """Read the header.

        Raises:
            ValueError: no such file, or not one of ours; names the setting and the path.
        """
        wanted = f"sparsekv.basis={str(path)!r}: must be a file written by sparsekv-calibrate"
        if not Path(path).is_file():
            raise ValueError(f"{wanted}, there is no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, set(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{wanted} ({error})") from error
        if metadata.get("kind") != KIND:
            raise ValueError(f"{wanted}, this is another safetensors file")
        if metadata.get("version") != VERSION:
            raise ValueError(
                f"{wanted} of version {VERSION}, this is version {metadata.get('version')}"
            )
        sizes = []
        for name in ("head_size", "num_layers", "num_kv_heads"):
            if not metadata.get(name, "").isdecimal():
                raise ValueError(f"{wanted}, its metadata have no number {name!r}")
            sizes.append(int(metadata[name]))
        basis = cls(Path(path), metadata.get("model", ""), *sizes)
        if names != {name for index in range(basis.num_layers) for name in _names(index)}:
            raise ValueError(f"{wanted}, layers are missing")
        return basis

    def layer(self, index: int) -> LayerMatrices:
        """Matrices of one layer, float32.

        Raises:
            ValueError: the file has no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise ValueError(
                f"sparsekv.basis={str(self.path)!r}: layer {index} is not one of its "
                f"{self.num_layers} layers"
            )
        with safe_open(self.path, framework="pt") as file:
            return LayerMatrices(*(file.get_tensor(name) for name in _names(index)))

    def check(self) -> None:
        """Read every matrix and see that a cache can be stored in it.

        Raises:
            ValueError: a tensor of another shape or dtype, or one that is not finite, singular or
                nearly so; names the file, the tensor and what is wrong.
        """
        shape = self.num_kv_heads, self.head_size, self.head_size
        with safe_open(self.path, framework="pt") as file:
            for name in (name for index in range(self.num_layers) for name in _names(index)):
                matrices, wrong = file.get_tensor(name), None
                if tuple(matrices.shape) != shape or matrices.dtype != torch.float32:
                    wrong = f"is {matrices.dtype} {tuple(matrices.shape)}, must be float32 {shape}"
                elif not matrices.isfinite().all():
                    wrong = "holds NaN or infinity"
                else:
                    sizes = torch.linalg.svdvals(matrices)
                    if sizes.min() < 1 / LARGEST_SIZE or sizes.max() > LARGEST_SIZE:
                        wrong = (
                            f"has singular values from {sizes.min():.3g} to {sizes.max():.3g}, "
                            f"must be within {1 / LARGEST_SIZE:g} to {LARGEST_SIZE:g}"
                        )
                if wrong:
                    raise ValueError(f"sparsekv.basis={str(self.path)!r}: {name} {wrong}")


def write_basis(path: str | Path, layers: Sequence[LayerMatrices], model: str) -> None:
    """Write the matrices of all layers; the file is there whole or as it was before.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    num_kv_heads, head_size, _ = layers[0].key.shape
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "model": model,
        "head_size": str(head_size),
        "num_layers": str(len(layers)),
        "num_kv_heads": str(num_kv_heads),
    }
    tensors = {
        name: matrices.float().clone(memory_format=torch.contiguous_format)
        for index, layer in enumerate(layers)
        for name, matrices in zip(_names(index), layer, strict=True)
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
    return [f"layers.{layer}.{kind}" for kind in LayerMatrices._fields]
