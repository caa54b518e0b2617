"""The evaluator with a calibrated basis: a method per layer, rows beside those of the presets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import write_basis
from vllm_sparsekv.settings import PRESETS, SparseKVConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality.attention import RuleModel  # noqa: E402
from quality.methods import DENSE, Shape, build_methods, sparse  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LAYERS, KV_HEADS, SIZE = 2, 2, 64
SHAPE = Shape(SIZE, KV_HEADS, LAYERS)


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Path:
    """Matrices that stretch the first coordinate of each key, more in the second layer."""
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    eye, zero = torch.eye(SIZE).repeat(KV_HEADS, 1, 1), torch.zeros(KV_HEADS, SIZE)
    one = torch.ones(KV_HEADS, SIZE)
    layers = {index: LayerBasis(eye.clone(), eye, zero, zero, one, one) for index in range(LAYERS)}
    layers[0].key[:, 0, 0], layers[1].key[:, 0, 0] = 2, 50
    write_basis(path, layers, LAYERS, "a-model")
    return path


def test_every_layer_has_its_own_method(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    seen = []

    def layer(index: int):
        def key(keys, query):
            seen.append((index, tuple(keys.shape)))
            return keys.float()

        return replace(DENSE, key=key)

    model = RuleModel(str(tmp_path), torch.float32)
    tokens = torch.arange(20)
    hidden = model.hidden(tokens, replace(DENSE, layers=(layer(0), layer(1))))
    assert seen == [(0, (KV_HEADS, 20, 16)), (1, (KV_HEADS, 20, 16))]
    assert torch.equal(hidden, model.hidden(tokens, DENSE))


def test_pruned_keys_lose_what_is_small_in_their_basis(basis):
    """Stretched 50 times, the first coordinate survives and is quantised coarsely for all."""
    config = SparseKVConfig(0.5, 0.0, "int4", "int4", 64, "auto", basis=str(basis))
    method = sparse(config, SIZE, torch.float32)
    key = torch.randn(KV_HEADS, 200, SIZE, generator=torch.Generator().manual_seed(0))
    key[..., 0] *= 0.1
    lost = [layer.key(key, None)[..., 0].sub(key[..., 0]) for layer in method.layers]
    first, second = (error.square().mean() / key[..., 0].square().mean() for error in lost)
    assert first > 0.9
    assert second < 0.02
    plain = sparse(replace(config, basis="none"), SIZE, torch.float32)
    for layer in method.layers:
        assert (layer.value(key) - plain.value(key)).abs().max() < 1e-5
    assert method.vector_bytes == plain.vector_bytes
    assert not plain.layers and "basis" not in plain.settings


def test_rows_of_calibrated_presets(basis):
    plain, methods = (
        build_methods(SHAPE, torch.bfloat16),
        build_methods(SHAPE, torch.bfloat16, basis=basis),
    )
    others = ("capacity-window-16-bit", "int4_int2-int3", "int3-int3", "pruned")
    integer = [name for name in PRESETS if not name.startswith("sparse-")]
    added = {f"sparsekv-{name}-calibrated" for name in (*integer, *others)}
    assert methods.keys() - plain.keys() == added | {"h2o-20-sparsekv-balanced-calibrated"}
    # Keys: 8 bytes of bitmap, 16 of codes and 2 of scale; values: 24 and 2.
    assert methods["sparsekv-pruned-calibrated"].vector_bytes == 26 + 26
    assert methods["sparsekv-capacity-calibrated"].vector_bytes == 28 + 18
    assert methods["sparsekv-capacity"].vector_bytes == 26 + 26
    for name in integer:
        row, calibrated = (methods[f"sparsekv-{name}{end}"] for end in ("", "-calibrated"))
        assert len(calibrated.layers) == LAYERS
        assert len(bytes.fromhex(calibrated.settings["basis"])) == 8
        if name != "capacity":
            assert calibrated.vector_bytes == row.vector_bytes
            assert calibrated.settings == row.settings | {"basis": calibrated.settings["basis"]}


def test_basis_of_another_head_size_is_refused(basis):
    with pytest.raises(ValueError, match=r"basis.safetensors: head sizes \[64\], must be 128"):
        build_methods(replace(SHAPE, head_size=128), torch.bfloat16, basis=basis)
