"""The rotation of whole integer vectors: exact, and invisible to attention but for its error."""

from __future__ import annotations

import pytest
import torch

from vllm_sparsekv.format.basis import Basis, LayerBasis, _calibrated, change, rotation
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.settings import SparseKVConfig

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


def ill_conditioned(heads: int, size: int) -> torch.Tensor:
    """(heads, size, size) float32 of determinant +-1 and condition 100."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.linalg.qr(
        torch.randn(2, heads, size, size, dtype=torch.float64, generator=generator)
    )[0]
    return (left * torch.logspace(-1, 1, size, dtype=torch.float64) @ right).float()


def int4_format(dtype: torch.dtype, key_sparsity: float = 0.0) -> SparseFormat:
    return SparseFormat.from_config(
        SparseKVConfig(key_sparsity, 0.5, "int4", "int4", 64, "auto"), 64, dtype
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_calibrated_matrices_have_16_bits_except_float32_models_on_gpus(dtype):
    layer = LayerBasis(
        *(ill_conditioned(2, 64) for _ in range(2)), *torch.zeros(2, 2, 64), *torch.ones(2, 2, 64)
    )
    for device, expected in (("cpu", torch.float16), ("meta", dtype)):
        basis = Basis.calibrated(int4_format(dtype), layer, device)
        matrices = (basis.key, basis.query, basis.value, basis.output)
        assert {x.dtype for x in matrices} == {expected}
        assert {x.device.type for x in matrices} == {device}


def test_bands_rotate_by_themselves():
    """What is large in the first half of a calibrated basis stays there, spread evenly."""
    config = SparseKVConfig(key_dtype="int4_int2", basis="b")
    fmt = SparseFormat.from_config(config, 64, torch.float32)
    layer = LayerBasis(
        *(ill_conditioned(2, 64) for _ in range(2)), *torch.zeros(2, 2, 64), *torch.ones(2, 2, 64)
    )
    basis = Basis.calibrated(fmt, layer)
    x = torch.eye(64).expand(2, 64, 64) @ torch.linalg.inv(layer.key)
    stored = change(x.transpose(0, 1), basis.key).transpose(0, 1)
    assert torch.allclose(stored[:, :32, 32:], torch.zeros(()), atol=1e-2)
    assert torch.allclose(stored[:, 32:, :32], torch.zeros(()), atol=1e-2)
    for half in (stored[:, :32, :32], stored[:, 32:, 32:]):
        assert torch.allclose(half.abs(), half.abs().mean(), rtol=5e-2)
    eye = basis.key.double() @ basis.query.mT.double()
    assert torch.allclose(eye, torch.eye(64, dtype=torch.float64), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_sparsity", [0.0, 0.5], ids=["rotated", "as it is"])
def test_narrow_calibrated_matrices_keep_scores(key_sparsity, dtype):
    """Only the inverse's rounding counts: errors within u, independent, have a deviation of
    u / sqrt(3), 7 of it are 4 u."""
    fmt = int4_format(dtype, key_sparsity)
    forward, inverse = (
        x[0].double() for x in _calibrated(fmt.key, ill_conditioned(1, 64), "cpu", dtype)
    )
    generator = torch.Generator().manual_seed(1)
    key, query = torch.randn(2, 200, 64, dtype=torch.float64, generator=generator)
    stored = key @ forward
    error = (stored * (query @ inverse.mT) - key * query).sum(-1)
    spread = query.square() @ inverse.mT.square() * stored.square()
    u = torch.finfo(dtype).eps / 2
    assert (error.abs() <= 4 * u * spread.sum(-1).sqrt()).all()
    assert all(x.isfinite().all() and x.abs().max() < 142 for x in (forward, inverse))
