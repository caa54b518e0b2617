"""The calibrated basis: what it follows from, its algebra, its file and its refusals."""

from __future__ import annotations

import hashlib
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from vllm_sparsekv.calibration import balance as balancing
from vllm_sparsekv.calibration.balance import balance, balanced_basis, layer_basis, reader_of
from vllm_sparsekv.calibration.moments import Moments, head_grams
from vllm_sparsekv.format.basis import Basis, LayerBasis, change, kv_heads_of_rank
from vllm_sparsekv.format.basis_file import VERSION, BasisFile, write_basis
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors
from vllm_sparsekv.settings import SparseKVConfig

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEADS, GROUP, SIZE, LAYERS = 2, 2, 16, 2
NO_MEANS = torch.zeros(2, HEADS, SIZE)
READ_ALIKE = torch.ones(2, HEADS, SIZE)


def vectors(*shape: int, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def moments(seed: int) -> torch.Tensor:
    """(HEADS, SIZE, SIZE) of vectors whose coordinates differ in size by up to 10."""
    x = vectors(HEADS, 40, SIZE, seed=seed) * torch.logspace(0, 1, SIZE, dtype=torch.float64)
    return x.mT @ x / 40


def test_balance_of_diagonal_moments():
    """T Sk T == T^-1 Sq T^-1 for diagonals: each entry of T is (sq / sk) ** (1 / 4)."""
    key = torch.tensor([1.0, 16.0, 4.0], dtype=torch.float64)
    query = torch.tensor([16.0, 1.0, 4.0], dtype=torch.float64)
    expected = torch.diag(torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64))
    assert (balance(key.diag(), query.diag()) - expected).abs().max() < 1e-12


def test_balance_makes_both_moments_the_same():
    key, query = moments(1), moments(2).flip(-1).flip(-2)
    transform = balance(key, query)
    back = torch.linalg.inv(transform)
    balanced, other = transform @ key @ transform.mT, back.mT @ query @ back
    assert (balanced - other).abs().max() < 1e-6 * balanced.abs().max()
    # White noise in every coordinate of the keys now moves scores by less.
    before, after = (
        a.diagonal(dim1=-2, dim2=-1).sum(-1) * b.diagonal(dim1=-2, dim2=-1).sum(-1)
        for a, b in ((key, query), (balanced, other))
    )
    assert (after < 0.5 * before).all()


def test_balanced_basis_sorts_coordinates_and_is_well_conditioned():
    matrices = balanced_basis(moments(1), moments(2))
    inverse = torch.linalg.inv(matrices)
    keys = matrices.mT @ moments(1) @ matrices
    energy = keys.diagonal(dim1=-2, dim2=-1)
    assert (energy[:, :-1] > energy[:, 1:]).all()
    # The ridge of 1 % leaves the two moments a little apart.
    queries = inverse @ moments(2) @ inverse.mT
    ratio = keys.diagonal(dim1=-2, dim2=-1) / queries.diagonal(dim1=-2, dim2=-1)
    assert (ratio / ratio.mean() - 1).abs().max() < 0.5
    assert torch.linalg.det(matrices).abs().sub(1).abs().max() < 1e-9
    assert torch.linalg.cond(matrices).max() < 10


def test_readers_of_a_balanced_basis_are_all_of_their_moment():
    key, query = moments(1), moments(2)
    matrices = balanced_basis(key, query)
    reader = reader_of(matrices, query)
    inverse = torch.linalg.inv(matrices)
    moment = inverse @ query @ inverse.mT
    scale = moment.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    assert (moment / scale[..., None] - reader.diag_embed()).abs().max() < 0.05
    assert (reader.amax(-1) == 1).all() and (reader > 0).all()


def test_condition_is_capped():
    """One coordinate of keys, another of queries 1e8 times as large: condition 1e4, no ridge."""
    key = torch.diag(torch.tensor([1e8] + [1.0] * 15, dtype=torch.float64)).unsqueeze(0)
    query = torch.diag(torch.tensor([1.0] * 15 + [1e8], dtype=torch.float64)).unsqueeze(0)
    condition = torch.linalg.cond(balanced_basis(key, query))
    assert condition.item() == pytest.approx((1e8 / 1.03) ** 0.5, rel=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balancing, "LARGEST_CONDITION", 4.0)
        condition = torch.linalg.cond(balanced_basis(key, query))
    assert condition.item() == pytest.approx(4.0, rel=1e-6)


def test_huge_directions_do_not_drown_the_others():
    """Two of 16 coordinates 1e5 times as large: the rest is balanced as if they were not there."""
    scale = torch.logspace(0, 1, SIZE, dtype=torch.float64)
    huge = torch.where(torch.arange(SIZE) < 2, 1e5, scale)
    key, query = torch.diag(huge).unsqueeze(0), torch.diag(scale.flip(0)).unsqueeze(0)
    stored = balanced_basis(key, query)[0]
    metric = (stored @ stored.mT).diagonal()[2:]
    expected = (scale.flip(0) / scale).sqrt()[2:]
    assert ((metric / expected) / (metric / expected).mean() - 1).abs().max() < 0.1


def test_what_no_query_weighs_is_stored_as_it_is():
    """Each query sees one key alone, whose weight p (1 - p) is 0."""
    key = vectors(5, HEADS, SIZE)
    moments = observed(key, key, key, projection=None, sliding_window=1)
    assert not moments.key_weight.any()
    layer = layer_basis(moments, centred=True)
    assert not layer.key_mean.any() and layer.key.isfinite().all()
    assert torch.linalg.cond(layer.key).max() < 100


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_scores_are_unchanged(sparsity):
    config = SparseKVConfig(sparsity, 0.5, "int4", "int4")
    fmt = SparseFormat.from_config(config, SIZE, torch.float32)
    matrices = balanced_basis(moments(1), moments(2)).float()
    basis = Basis.calibrated(fmt, LayerBasis(matrices, matrices.flip(0), *NO_MEANS, *READ_ALIKE))
    assert basis.key.dtype == basis.query.dtype == torch.float16
    tokens = 30
    key = vectors(tokens, HEADS, SIZE).float()
    query = vectors(tokens, HEADS * GROUP, SIZE, seed=8).float()
    stored, asked = change(key, basis.key), change(query, basis.query)
    assert stored.is_contiguous() and asked.is_contiguous()
    for head in range(HEADS * GROUP):
        expected = query[:, head].double() @ key[:, head // GROUP].double().mT
        scores = asked[:, head].double() @ stored[:, head // GROUP].double().mT
        assert (scores - expected).abs().max() < 2**-11 * expected.abs().max()
    alone = key[:, 1].double() @ basis.key[1].double()
    assert (stored[:, 1] - alone).abs().max() < 1e-5
    assert change(key.bfloat16(), basis.key).dtype == torch.bfloat16
    assert change(key[:0], basis.key).shape == (0, HEADS, SIZE)


@pytest.mark.parametrize(("sparsity", "spread"), [(0.0, (1.0, 1.5)), (0.5, (2.0, 3.0))])
def test_whole_vectors_are_spread_and_pruned_ones_are_not(sparsity, spread):
    """Largest to mean size of the coordinates, root mean squares over the tokens of one head."""
    config = SparseKVConfig(sparsity, sparsity, "int4", "int4")
    fmt = SparseFormat.from_config(config, SIZE, torch.float32)
    x = vectors(HEADS, 4000, SIZE) * torch.logspace(0, 1, SIZE, dtype=torch.float64)
    moment = x.mT @ x / 4000
    matrices = balanced_basis(moment, moment)
    basis = Basis.calibrated(fmt, LayerBasis(matrices, matrices, *NO_MEANS, *READ_ALIKE))
    for matrix in (basis.key, basis.value):
        stored = change(x.transpose(0, 1).float(), matrix)
        size = stored.square().mean(0).sqrt()
        ratio = size.amax(-1) / size.mean(-1)
        assert spread[0] <= ratio.min() and ratio.max() < spread[1]


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [
        (3, 1, [[0, 1, 2]]),
        (8, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (2, 2, [[0], [1]]),
        (2, 8, [[0]] * 4 + [[1]] * 4),
        (1, 4, [[0]] * 4),
    ],
)
def test_heads_of_tensor_parallel_ranks(heads, size, expected):
    slices = [kv_heads_of_rank(heads, rank, size) for rank in range(size)]
    assert [list(range(heads))[part] for part in slices] == expected


def some_layers() -> dict[int, LayerBasis]:
    """Of layers 0 and 2."""
    means = vectors(2, 2, HEADS, SIZE)
    return {
        index: LayerBasis(
            *torch.eye(SIZE).repeat(2, HEADS, 1, 1), *means[index // 2], *READ_ALIKE.clone()
        )
        for index in (0, 2)
    }


def test_file_round_trip(tmp_path):
    path = tmp_path / "basis.safetensors"
    layers = some_layers()
    write_basis(path, layers, 3, "a-model")
    file = BasisFile.open(str(path))
    assert file == BasisFile(path, "a-model", 3, {0: (HEADS, SIZE), 2: (HEADS, SIZE)})
    file.check()
    for index, layer in layers.items():
        assert all(map(torch.equal, file.layer(index), (x.float() for x in layer)))
    assert torch.equal(
        file.layer(2).of_heads(slice(1, 2)).key_mean[0], layers[2].key_mean[1].float()
    )
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for index in (-1, 1, 3):
        with pytest.raises(ValueError, match=rf"layer {index} is not one of its 2 layers"):
            file.layer(index)


def test_files_of_others_are_refused(tmp_path):
    wanted = r"sparsekv\.basis='.*': must be a file written by sparsekv-calibrate"
    path = tmp_path / "basis.safetensors"
    with pytest.raises(ValueError, match=f"{wanted}, there is no such file"):
        BasisFile.open(path)
    with pytest.raises(ValueError, match=f"{wanted}, there is no such file"):
        BasisFile.open(tmp_path)
    path.write_text("no tensors")
    with pytest.raises(ValueError, match=rf"{wanted} \("):
        BasisFile.open(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"{wanted}, this is another safetensors file"):
        BasisFile.open(path)
    header = {"kind": "vllm_sparsekv basis", "version": "2"}
    save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=f"{wanted} of version 4, this is version 2"):
        BasisFile.open(path)
    header |= {"version": VERSION, "model": "m"}
    save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=f"{wanted}, its metadata have no number 'num_layers'"):
        BasisFile.open(path)
    eyes = {f"layers.0.{kind}": torch.eye(SIZE)[None] for kind in ("key", "value")}
    names = ("key_mean", "value_mean", "key_reader", "value_reader")
    means = {f"layers.0.{kind}": torch.ones(1, SIZE) for kind in names}
    header |= {"num_layers": "1"}
    wrong = [{"x": torch.zeros(1)}, eyes, eyes | means | {"layers.0.value": torch.eye(8)[None]}]
    for tensors in wrong:
        save_file({name: x.clone() for name, x in tensors.items()}, path, header)
        with pytest.raises(ValueError, match=f"{wanted}, layers are missing or of wrong shapes"):
            BasisFile.open(path)
    save_file({name: x.double() for name, x in (eyes | means).items()}, path, header)
    with pytest.raises(ValueError, match=r"layers\.0\.key is torch.float64, must be torch.float32"):
        BasisFile.open(path).check()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.fill_(torch.nan), "holds NaN or infinity"),
        (lambda x: x[0].zero_(), r"has singular values from 0 to \S+, must be within 0.005 to 200"),
        (lambda x: x.mul_(1e4), r"has singular values from \S+ to \S+, must be within"),
    ],
)
def test_matrices_that_would_spoil_the_cache_are_refused(tmp_path, spoil, message):
    path = tmp_path / "basis.safetensors"
    layers = some_layers()
    spoil(layers[2].value)
    write_basis(path, layers, 3, "a-model")
    with pytest.raises(ValueError, match=rf"basis='.*': layers\.2\.value {message}"):
        BasisFile.open(path).check()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9])
def test_readers_that_are_not_positive_are_refused(tmp_path, value):
    path = tmp_path / "basis.safetensors"
    layers = some_layers()
    layers[2].key_reader[1, 3] = value
    write_basis(path, layers, 3, "a-model")
    with pytest.raises(ValueError, match=r"layers\.2\.key_reader holds \S+ to 1, must be positive"):
        BasisFile.open(path).check()


def test_means_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    layers = some_layers()
    layers[0].value_mean[0, 0] = torch.inf
    write_basis(path, layers, 3, "a-model")
    with pytest.raises(ValueError, match=r"layers\.0\.value_mean holds NaN or infinity"):
        BasisFile.open(path).check()


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "basis.safetensors"
    path.write_text("a good one")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_basis(path, some_layers(), 3, "a-model")
    assert path.read_text() == "a good one" and list(tmp_path.iterdir()) == [path]


def observed(*parts: torch.Tensor, projection: torch.Tensor | None, **options) -> Moments:
    """Moments of one sequence, (tokens, heads, D) each."""
    moments = Moments.zeros(parts[1].shape[1], parts[1].shape[2])
    reading = None if projection is None else head_grams(projection, parts[1].shape[2])
    moments.observe(*parts, reading, **({"scale": 1.0} | options))
    return moments


def test_moments_of_one_sequence():
    """Two queries of one head; the first sees one key, so only the second weighs the keys."""
    projection = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 4.0]])
    key = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(2, 1, 2)
    query = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).view(2, 1, 2)
    value = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2)
    moments = observed(query, key, value, projection=projection, scale=math.log(3))
    # Scores of the second query: log 3 and 0, so p = 3 / 4 and 1 / 4.
    weight = 3 / 16
    expected = torch.tensor([[weight, 0], [0, 4 * weight]], dtype=torch.float64)
    assert (moments.key[0] - expected).abs().max() < 1e-6
    assert moments.key_sum[0].tolist() == pytest.approx([weight, 2 * weight])
    assert moments.key_weight.item() == pytest.approx(2 * weight)
    assert torch.equal(moments.query[0], torch.diag(torch.tensor([10.0, 0.0])).double())
    # p squared: 1 of the first query, 9 / 16 and 1 / 16 of the second.
    expected = torch.tensor([[25 / 16, 0], [0, 1 / 16]], dtype=torch.float64)
    assert (moments.value[0] - expected).abs().max() < 1e-6
    assert moments.value_sum[0].tolist() == pytest.approx([25 / 16, 1 / 16])
    assert moments.value_weight.item() == pytest.approx(26 / 16)
    expected = 26 / 16 * torch.tensor([[1.0, 0], [0, 25.0]], dtype=torch.float64)
    assert (moments.output[0] - expected).abs().max() < 1e-5
    unknown = observed(query, key, value, projection=None, scale=math.log(3)).output[0]
    assert (unknown - 26 / 16 * torch.eye(2)).abs().max() < 1e-5


def test_moments_see_windows_caps_and_sinks():
    """One query after two keys, scores 2 and 0 before the cap."""
    key = torch.tensor([[2.0, 0.0], [0.0, 2.0]]).view(2, 1, 2)
    query = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(2, 1, 2)

    def weights(**options) -> list[float]:
        moments = observed(query, key, key, projection=None, **options)
        return (moments.value[0].diagonal() / 4).tolist()

    # The first query sees one key: p squared is 1.
    assert weights(sliding_window=1) == pytest.approx([1, 1])
    p = 1 / (1 + math.exp(-math.tanh(2)))
    assert weights(soft_cap=1.0) == pytest.approx([1 + p**2, (1 - p) ** 2], rel=1e-5)
    total = math.exp(2) + 1 + math.exp(3)
    with_sink = [1 / (1 + math.exp(3)) ** 2 + (math.exp(2) / total) ** 2, 1 / total**2]
    assert weights(sinks=torch.tensor([3.0])) == pytest.approx(with_sink, rel=1e-5)
    capped = observed(query, key, key, projection=None, soft_cap=1.0)
    slope = [1 - math.tanh(2) ** 2, 1.0]
    expected = [4 * p * (1 - p) * x**2 for x in slope]
    assert capped.key[0].diagonal().tolist() == pytest.approx(expected, rel=1e-4)


def test_output_moments_weigh_heads_by_their_own_attention():
    """Of a group's two heads one looks at one token, the other at all four alike."""
    projection = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    key = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).view(4, 1, 2)
    query = torch.zeros(4, 2, 2)
    query[:, 0, 0] = 1000
    moments = observed(query, key, torch.ones(4, 1, 2), projection=projection)
    expected = torch.diag(torch.tensor([4.0, 1 + 1 / 2 + 1 / 3 + 1 / 4], dtype=torch.float64))
    assert (moments.output[0] - expected).abs().max() < 1e-6


def test_moments_of_ranks_add_up():
    """Four KV heads on two ranks, and one head on two ranks with half of its queries each."""
    query, key, value = (
        vectors(9, 8, SIZE),
        vectors(9, 4, SIZE, seed=8),
        vectors(9, 4, SIZE, seed=9),
    )
    projection = vectors(5, 8 * SIZE, seed=10)
    whole = observed(query, key, value, projection=projection)
    summed = Moments.zeros(4, SIZE)
    halves = projection.view(5, 8, SIZE)
    for heads in (slice(0, 2), slice(2, 4)):
        queries = slice(2 * heads.start, 2 * heads.stop)
        rank = (query[:, queries], key[:, heads], value[:, heads])
        part = observed(*rank, projection=halves[:, queries].flatten(1))
        summed.add(part, heads)
    for name, tensor in vars(whole).items():
        assert (getattr(summed, name) - tensor).abs().max() < 1e-6 * tensor.abs().max()
    alone = observed(query[:, :2], key[:, :1], value[:, :1], projection=None)
    shared = Moments.zeros(1, SIZE)
    for head in (0, 1):
        part = observed(query[:, head : head + 1], key[:, :1], value[:, :1], projection=None)
        shared.add(part, slice(0, 1))
    for name, tensor in vars(alone).items():
        assert (getattr(shared, name) - tensor).abs().max() < 1e-6 * tensor.abs().max()


def test_means_take_off_what_all_keys_share():
    """Keys of size 1 around an offset of 300, as key biases make; int3 resolves them still."""
    fmt = SparseFormat.from_config(SparseKVConfig(0.0, 0.0, "int3", "int3"), SIZE, torch.float32)
    offset = torch.zeros(SIZE, dtype=torch.float64)
    offset[3] = 300
    query = vectors(200, HEADS * GROUP, SIZE)
    key, value = vectors(200, HEADS, SIZE, seed=8) + offset, vectors(200, HEADS, SIZE, seed=9)
    moments = observed(query, key, value, projection=None, scale=0.25)
    errors = {}
    for centred in (True, False):
        layer = layer_basis(moments, centred)
        assert (layer.key_mean[:, 3] - 300).abs().max() < 1 if centred else not layer.key_mean.any()
        basis = Basis.calibrated(fmt, layer)
        packed = pack_vectors(basis.stored_key(key.float()), fmt.key)
        read = change(unpack_vectors(*packed, fmt.key), basis.query.mT, plus=basis.key_mean)
        lost = (read.double() - key).transpose(0, 1)
        # What all keys lack alike, softmax does not see.
        lost = lost - lost.mean(1, keepdim=True)
        asked = query.transpose(0, 1).unflatten(0, (HEADS, GROUP))
        errors[centred] = (asked @ lost.unsqueeze(1).mT).square().mean().sqrt().item()
    assert errors[True] < 1.2
    assert errors[False] > 2 * errors[True]
