"""One attention layer of the real backend in a calibrated basis, without an engine around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engines import MODEL
from planning import Layer, build_layers
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_sparsekv.engine.backend import SparseKVMetadata
from vllm_sparsekv.format.basis import Basis, LayerBasis, change
from vllm_sparsekv.format.basis_file import write_basis
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors

LAYERS, HEADS, KV_HEADS, SIZE, TOKENS = 30, 9, 3, 64, 40


@pytest.fixture(scope="module")
def bases() -> dict[int, LayerBasis]:
    """Scaled rotations, means and readers of which no two are alike."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(LAYERS, 2, KV_HEADS, SIZE, SIZE, generator=generator)
    scaled = torch.linalg.qr(random).Q * torch.logspace(-0.5, 0.5, SIZE)
    means = torch.randn(LAYERS, 2, KV_HEADS, SIZE, generator=generator)
    readers = torch.randn(LAYERS, 2, KV_HEADS, SIZE, generator=generator).exp()
    return {i: LayerBasis(*scaled[i], *means[i], *readers[i]) for i in range(LAYERS)}


@pytest.fixture(
    scope="module",
    params=[(0.0, "int4"), (0.5, "int4"), (0.0, "int4_int2")],
    ids=["whole", "pruned", "two bands"],
)
def config(
    request, bases: dict[int, LayerBasis], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmConfig]:
    folder: Path = tmp_path_factory.mktemp("basis")
    write_basis(folder / "basis.safetensors", bases, LAYERS, "demo")
    sparsity, key_dtype = request.param
    settings = {
        "key_sparsity": sparsity,
        "value_sparsity": sparsity,
        "key_dtype": key_dtype,
        "value_dtype": "int4",
        "window": 0,
        "basis": str(folder / "basis.safetensors"),
    }
    engine = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        attention_backend="sparsekv",
        additional_config={"sparsekv": settings},
    )
    config = engine.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder / 'store'}", 0, "gloo")
        initialize_model_parallel()
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of one query after all keys, (HEADS, SIZE)."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    weight = (torch.einsum("hd,nhd->hn", query, key) * SIZE**-0.5).softmax(-1)
    return torch.einsum("hn,nhd->hd", weight, value)


def test_a_layer_takes_its_own_basis(config: VllmConfig, bases: dict[int, LayerBasis]) -> None:
    """History reads back as layer 7's basis leaves it; the step's own only pass its matrices."""
    (layer,) = build_layers(config, {7: Layer()})
    current_platform.update_block_size_for_backend(config)
    impl, fmt = layer.impl, layer.impl.cache.format
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(TOKENS + 1, HEADS, SIZE, generator=generator)
    key, value = torch.randn(2, TOKENS + 1, KV_HEADS, SIZE, generator=generator)
    pages = torch.zeros(2, KV_HEADS, 64, fmt.token_bytes, dtype=torch.uint8)
    out = torch.empty_like(query)
    for start, stop in ((0, TOKENS), (TOKENS, TOKENS + 1)):
        step = slice(start, stop)
        metadata = SparseKVMetadata(
            stop - start,
            torch.tensor([0, stop - start], dtype=torch.int32),
            torch.tensor([stop], dtype=torch.int32),
            torch.tensor([[1]], dtype=torch.int32),
            64 + torch.arange(start, stop),
        )
        arguments = (query[step], key[step], value[step], pages, metadata, out[step])
        impl.forward(layer, *arguments)
    exact = attention(query[TOKENS - 1], key[:TOKENS], value[:TOKENS])
    assert (out[TOKENS - 1] - exact).abs().max() < 3e-3  # its matrices are float16
    basis = Basis.calibrated(fmt, bases[7])
    stored_key, stored_value = basis.stored_key(key), basis.stored_value(value)
    for stored, vector, feedback in (
        (stored_key, fmt.key, basis.key_feedback),
        (stored_value, fmt.value, basis.value_feedback),
    ):
        packed = pack_vectors(stored[:TOKENS], vector, feedback)
        stored[:TOKENS] = unpack_vectors(*packed, vector)
    read_key = change(stored_key, basis.query.mT, plus=basis.key_mean)
    expected = attention(query[TOKENS], read_key, basis.restored(stored_value))
    assert (out[TOKENS] - expected).abs().max() < 1e-5
    assert (expected - attention(query[TOKENS], key, value)).abs().max() > 1e-3
