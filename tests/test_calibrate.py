"""The calibrated basis: its algebra, its file, its refusals and the command that makes it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_sparsekv.calibration import balance as balancing
from vllm_sparsekv.calibration.__main__ import main, parse
from vllm_sparsekv.calibration.balance import balance, balanced_basis
from vllm_sparsekv.calibration.moments import Moments, calibrate
from vllm_sparsekv.format.basis import Basis, LayerMatrices, change, kv_heads_of_rank
from vllm_sparsekv.format.basis_file import BasisFile, write_basis
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors
from vllm_sparsekv.settings import SparseKVConfig

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEADS, GROUP, SIZE, LAYERS = 2, 2, 16, 2


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


def test_condition_is_capped():
    """Keys 1e8 times as large in one coordinate: without ridge and cap T has condition 1e4."""
    key = torch.diag(torch.tensor([1e8] + [1.0] * 15, dtype=torch.float64)).unsqueeze(0)
    query = torch.diag(torch.tensor([1.0] * 15 + [1e8], dtype=torch.float64)).unsqueeze(0)
    condition = torch.linalg.cond(balanced_basis(key, query))
    assert condition.item() == pytest.approx(40.0, rel=0.02)  # (1 / (RIDGE / 16)) ** (1 / 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balancing, "LARGEST_CONDITION", 4.0)
        condition = torch.linalg.cond(balanced_basis(key, query))
    assert condition.item() == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_scores_are_unchanged(sparsity):
    config = SparseKVConfig(sparsity, 0.5, "int4", "int4")
    fmt = SparseFormat.from_config(config, SIZE, torch.float32)
    matrices = balanced_basis(moments(1), moments(2)).float()
    basis = Basis.calibrated(fmt, LayerMatrices(key=matrices, value=matrices.flip(0)))
    assert basis.key.dtype == basis.query.dtype == torch.float32
    tokens = 30
    key = vectors(tokens, HEADS, SIZE).float()
    query = vectors(tokens, HEADS * GROUP, SIZE, seed=8).float()
    stored, asked = change(key, basis.key), change(query, basis.query)
    assert stored.is_contiguous() and asked.is_contiguous()
    for head in range(HEADS * GROUP):
        expected = query[:, head].double() @ key[:, head // GROUP].double().mT
        scores = asked[:, head].double() @ stored[:, head // GROUP].double().mT
        assert (scores - expected).abs().max() < 2e-6 * expected.abs().max()
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
    basis = Basis.calibrated(fmt, LayerMatrices(key=matrices, value=matrices))
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


def test_file_round_trip(tmp_path):
    path = tmp_path / "basis.safetensors"
    layers = [LayerMatrices(*pair) for pair in vectors(LAYERS, 2, HEADS, SIZE, SIZE)]
    write_basis(path, layers, "a-model")
    file = BasisFile.open(str(path))
    assert file == BasisFile(path, "a-model", SIZE, LAYERS, HEADS)
    for index, (key, value) in enumerate(layers):
        assert torch.equal(file.layer(index).key, key.float())
        assert torch.equal(file.layer(index).value, value.float())
    for index in (-1, LAYERS):
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
    header = {"kind": "vllm_sparsekv basis", "version": "1"}
    save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=f"{wanted} of version 2, this is version 1"):
        BasisFile.open(path)
    header |= {"version": "2", "model": "m", "head_size": "16", "num_layers": "1"}
    save_file({"x": torch.zeros(1)}, path, header)
    with pytest.raises(ValueError, match=f"{wanted}, its metadata have no number 'num_kv_heads'"):
        BasisFile.open(path)
    save_file({"x": torch.zeros(1)}, path, header | {"num_kv_heads": "1"})
    with pytest.raises(ValueError, match=f"{wanted}, layers are missing"):
        BasisFile.open(path)


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
    layers = [LayerMatrices(*torch.eye(SIZE).repeat(2, HEADS, 1, 1)) for _ in range(LAYERS)]
    write_basis(path, layers, "a-model")
    BasisFile.open(path).check()
    spoil(layers[1].value)
    write_basis(path, layers, "a-model")
    with pytest.raises(ValueError, match=rf"basis='.*': layers\.1\.value {message}"):
        BasisFile.open(path).check()


def test_matrices_of_another_shape_or_dtype_are_refused(tmp_path):
    path = tmp_path / "basis.safetensors"
    header = {"kind": "vllm_sparsekv basis", "version": "2", "model": "m", "num_layers": "1"}
    header |= {"head_size": "16", "num_kv_heads": "1"}
    names = ("layers.0.key", "layers.0.value")
    for matrix in (torch.eye(16), torch.eye(16).double()[None]):
        save_file({name: matrix.clone() for name in names}, path, header)
        with pytest.raises(ValueError, match=r"layers\.0\.key is torch.* must be float32 \(1, 16"):
            BasisFile.open(path).check()


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "basis.safetensors"
    path.write_text("a good one")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    layers = [LayerMatrices(*torch.eye(SIZE).repeat(2, HEADS, 1, 1))]
    with pytest.raises(OSError, match="No space left"):
        write_basis(path, layers, "a-model")
    assert path.read_text() == "a good one" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
        head_dim=SIZE,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def test_observed_attention_is_the_model_itself(model_path):
    plain = LlamaForCausalLM.from_pretrained(model_path).eval()
    tokens = torch.arange(50).unsqueeze(0)
    with torch.inference_mode():
        expected = plain(tokens).logits
        calibrate(plain, tokens, context=50)
        got = plain(tokens).logits
    assert (got - expected).abs().max() < 1e-5


def test_samples_are_spread_over_the_context(model_path):
    """Else planes that rotary embedding turns slowly are stretched as if they never turned."""
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    seen = []

    def record(module, arguments, settings):
        seen.append(settings["position_ids"][0])

    model.base_model.register_forward_pre_hook(record, with_kwargs=True)
    samples = torch.arange(16 * 20).view(16, 20) % 97
    calibrate(model, samples, context=2020)
    first = torch.stack([positions[0] for positions in seen]).sort().values
    assert all(torch.equal(x, x[0] + torch.arange(20)) for x in seen)
    assert 0 <= first[0] < 300 and 1700 < first[-1] <= 2000
    assert first.diff().max() < 300
    seen.clear()
    calibrate(model, samples, context=20)
    assert all(positions[0] == 0 for positions in seen)


def test_far_keys_lose_no_more_than_near_ones(model_path):
    """Error of scores at the end of the context against its start, with keys stored in 3 bits.

    As in trained models, keys have a large mean in planes that rotary embedding turns slowly.
    """
    model = LlamaForCausalLM.from_pretrained(model_path, attention_bias=True).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.bias.data.zero_().view(-1, SIZE)[:, 4:7] = 1
    samples = torch.randint(97, (16, 64), generator=torch.Generator().manual_seed(0))
    fmt = SparseFormat.from_config(SparseKVConfig(0.0, 0.0, "int3", "int3"), SIZE, torch.float32)

    def error(context: int, first: int) -> float:
        layers = calibrate(model, samples, context)
        heads = []

        def attention(module, query, key, value, mask, **kwargs):
            basis = Basis.calibrated(fmt, layers[module.layer_idx])
            packed = pack_vectors(change(key[0].transpose(0, 1), basis.key), fmt.key)
            lost = change(unpack_vectors(*packed, fmt.key), basis.query.mT).transpose(0, 1) - key[0]
            heads.append((query[0].unflatten(0, (HEADS, GROUP)) @ lost.unsqueeze(1).mT).square())
            return query.transpose(1, 2), None

        ALL_ATTENTION_FUNCTIONS.register("lossy", attention)
        model.set_attn_implementation("lossy")
        positions = torch.arange(first, first + 64).unsqueeze(0)
        with torch.inference_mode():
            model.base_model(samples[:1], position_ids=positions, use_cache=False)
        return torch.stack(heads).mean().item()

    assert error(2048, 1984) < 2 * error(2048, 0)
    assert error(64, 1984) > 4 * error(64, 0)


def attention_layer(weight: torch.Tensor) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.layer_idx = 0
    layer.o_proj = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.o_proj.weight.data = weight
    return layer


def test_moments_of_one_attention_layer():
    """Two queries of one head; the first sees one key, so only the second weighs the keys."""
    observed = Moments()
    layer = attention_layer(torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 4.0]]))
    key = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).view(1, 1, 2, 2)
    query = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    value = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    out, _ = observed.attention(layer, query, key, value, None, scaling=math.log(3))
    # Scores of the second query: log 3 and 0, so p = 3 / 4 and 1 / 4; twice observed.
    assert torch.allclose(out, torch.tensor([[1.0, 0.0], [0.75, 0.25]]).view(1, 2, 1, 2))
    observed.attention(layer, query, key, value, None, scaling=math.log(3))
    weight = 2 * 3 / 16
    expected = torch.tensor([[weight, 0], [0, 4 * weight]], dtype=torch.float64)
    assert (observed.key[0][0] - expected).abs().max() < 1e-6
    expected = torch.tensor([[20.0, 0], [0, 0]], dtype=torch.float64)
    assert torch.equal(observed.query[0][0], expected)
    # p squared: 1 of the first query, 9 / 16 and 1 / 16 of the second.
    expected = 2 * torch.tensor([[25 / 16, 0], [0, 1 / 16]], dtype=torch.float64)
    assert (observed.value[0][0] - expected).abs().max() < 1e-6
    expected = 2 * 26 / 16 * torch.tensor([[1.0, 0], [0, 25.0]], dtype=torch.float64)
    assert (observed.output[0][0] - expected).abs().max() < 1e-5


def test_output_moments_weigh_heads_by_their_own_attention():
    """Of a group's two heads one looks at one token, the other at all four alike."""
    observed = Moments()
    layer = attention_layer(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    key = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]).view(1, 1, 4, 2)
    query = torch.zeros(1, 2, 4, 2)
    query[0, 0, :, 0] = 1000
    observed.attention(layer, query, key, torch.ones(1, 1, 4, 2), None, scaling=1.0)
    expected = torch.diag(torch.tensor([4.0, 1 + 1 / 2 + 1 / 3 + 1 / 4], dtype=torch.float64))
    assert (observed.output[0][0] - expected).abs().max() < 1e-6
    layer.o_proj = None
    with pytest.raises(ValueError, match="Module: has no output projection, must be one of"):
        observed.attention(layer, query, key, key, None, scaling=1.0)


def test_command(model_path, tmp_path, capsys):
    text, output = tmp_path / "words.txt", tmp_path / "basis.safetensors"
    text.write_text(" ".join(f"w{i * i % 97}" for i in range(130)))
    command = [str(model_path), "--text", str(text), "--output", str(output), "--device", "cpu"]
    main([*command, "--tokens", "129", "--length", "64"])
    assert "2 layers, 128 tokens, condition " in capsys.readouterr().out
    file = BasisFile.open(output)
    assert (file.head_size, file.num_layers, file.num_kv_heads) == (SIZE, LAYERS, HEADS)
    assert file.model == model_path.name
    for index in range(LAYERS):
        for matrices in file.layer(index):
            matrices = matrices.double()
            assert torch.linalg.det(matrices).abs().sub(1).abs().max() < 1e-5
            assert torch.linalg.cond(matrices).min() > 1
            assert torch.linalg.cond(matrices).max() <= 100
    both = [str(model_path), "--text", str(text), str(text), "--output", str(output)]
    main([*both, "--device", "cpu", "--tokens", "256", "--length", "64"])
    assert "2 layers, 256 tokens, condition " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"words.txt: 130 tokens, must be >= 16384 \(--tokens\)"):
        main(command)
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path / "nothing"), "--text", str(text)])
    for context in ("63", "2049"):
        wanted = rf"--context {context}: must be >= 64 \(--length\) and <= 2048"
        with pytest.raises(SystemExit, match=wanted):
            main([*command, "--tokens", "128", "--length", "64", "--context", context])
    with pytest.raises(SystemExit):
        main([*command, "--length", "1"])
    assert "--length 1: must be > 1 and <= 16384, a text's --tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([str(model_path), "--text", str(text), "--output", "no/basis"])
    assert "--output no/basis: there is no folder no" in capsys.readouterr().err
