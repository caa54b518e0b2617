"""The rotation of whole integer vectors: exact, and invisible to attention but for its error."""

from __future__ import annotations

import pytest
import torch

from vllm_sparsekv.basis import Basis, change, rotation
from vllm_sparsekv.config import SparseKVConfig
from vllm_sparsekv.format import SparseFormat

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIZES = (16, 64, 80, 96, 128, 256)


@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_orthogonal_up_to_a_factor(size):
    forward, inverse = (matrix.double() for matrix in rotation(size))
    eye = torch.eye(size, dtype=torch.float64)
    assert (forward @ inverse - eye).abs().max() < 1e-6
    gram = forward @ forward.mT
    assert (gram / gram[0, 0] - eye).abs().max() < 1e-6
    assert 0.5 < gram[0, 0] <= 2


@pytest.mark.parametrize("size", [16, 64, 128, 256])
def test_powers_of_two_rotate_exactly(size):
    """In bfloat16 the product of both matrices is the identity, without rounding."""
    forward, inverse = rotation(size)
    assert forward.unique().numel() == inverse.unique().numel() == 2
    product = forward.bfloat16().double() @ inverse.bfloat16().double()
    assert torch.equal(product, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_rotation_spreads_an_outlier(size):
    """One channel of 20 times the others' size: the largest coefficient is near the average."""
    x = torch.randn(500, size, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 20
    y = change(x, rotation(size)[0])
    assert (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean() > 3.4
    assert (y.abs().amax(-1) / y.square().mean(-1).sqrt()).mean() < 3.2


@pytest.mark.parametrize(
    ("settings", "rotated"),
    [
        ({"key_sparsity": 0.0, "key_dtype": "int4"}, (True, False)),
        ({"value_sparsity": 0.0, "value_dtype": "int3"}, (False, True)),
        ({"value_sparsity": 0.0, "value_dtype": "fp8"}, (False, False)),
        ({"key_sparsity": 0.0, "key_dtype": "auto"}, (False, False)),
        ({"key_sparsity": 0.0, "key_dtype": "int3", "value_sparsity": 0.0}, (True, True)),
    ],
)
def test_whole_integer_vectors_are_rotated(settings, rotated):
    half = {"key_sparsity": 0.5, "value_sparsity": 0.5, "key_dtype": "int4", "value_dtype": "int4"}
    fmt = SparseFormat.from_config(SparseKVConfig(**half | settings), 64, torch.float32)
    basis = Basis.of(fmt)
    assert (fmt.key.rotated, fmt.value.rotated) == rotated
    assert tuple(x is not None for x in (basis.key, basis.value)) == rotated
    assert tuple(x is not None for x in (basis.query, basis.output)) == rotated
