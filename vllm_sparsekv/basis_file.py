"""The file of calibrated key bases that ``sparsekv-calibrate`` writes, in safetensors format.

It holds one tensor ``layers.<index>.key``, (num_kv_heads, D, D) float32, per decoder layer: what
the post-RoPE keys of each KV head are multiplied with. The header's metadata say what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

KIND = "vllm_sparsekv key basis"
VERSION = "1"


@dataclass(frozen=True)
class BasisFile:
    """The header of a file of key bases.

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
        sizes = [int(metadata[name]) for name in ("head_size", "num_layers", "num_kv_heads")]
        basis = cls(Path(path), metadata["model"], *sizes)
        if names != {_name(index) for index in range(basis.num_layers)}:
            raise ValueError(f"{wanted}, layers are missing")
        return basis

    def layer(self, index: int) -> torch.Tensor:
        """Key matrices of one layer, (num_kv_heads, D, D) float32.

        Raises:
            ValueError: the file has no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise ValueError(
                f"sparsekv.basis={str(self.path)!r}: layer {index} is not one of its "
                f"{self.num_layers} layers"
            )
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(_name(index))


def write_basis(path: str | Path, matrices: list[torch.Tensor], model: str) -> None:
    """Write the key matrices of all layers, each (num_kv_heads, D, D)."""
    num_kv_heads, head_size, _ = matrices[0].shape
    metadata = {
        "kind": KIND,
        "version": VERSION,
        "model": model,
        "head_size": str(head_size),
        "num_layers": str(len(matrices)),
        "num_kv_heads": str(num_kv_heads),
    }
    tensors = {_name(index): x.float().contiguous() for index, x in enumerate(matrices)}
    Path(path).write_bytes(save(tensors, metadata))


def _name(layer: int) -> str:
    return f"layers.{layer}.key"
