"""What vLLM plans for the ranks of one engine, and what each rank holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planning import Layer, build_layers, configure, layer_name
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.v1.kv_cache_interface import KVCacheConfig

import vllm_sparsekv
from vllm_sparsekv.engine import layers as engine_layers
from vllm_sparsekv.engine.backend import SparseKVImpl
from vllm_sparsekv.engine.compat import VLLM_VERSION
from vllm_sparsekv.engine.compat.planning import plan_cache, plan_ranks
from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import write_basis
from vllm_sparsekv.format.fingerprint import PAGE_VERSION

MODEL: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "sliding_window": 1024,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
}
MEMORY = 1 << 26


@pytest.fixture(autouse=True)
def become(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process a tensor-parallel rank of so many; at first the only one."""

    def become(rank: int, size: int) -> None:
        for module in (engine_layers, linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    monkeypatch.setattr(engine_layers, "of_ranks", lambda _, mine: [mine])
    become(0, 1)
    return become


def rank(folder: Path, layers: range, settings: dict[str, Any], **options: Any) -> Any:
    """The configuration of a rank that has built these layers."""
    config = configure(
        folder,
        MODEL,
        max_model_len=4096,
        attention_backend="sparsekv",
        additional_config={"sparsekv": {"preset": "balanced"} | settings},
        **options,
    )
    windows = {"sliding_attention": MODEL["sliding_window"], "full_attention": None}
    build_layers(config, {i: Layer(windows[MODEL["layer_types"][i]]) for i in layers})
    return config


def layers_of(config: Any) -> dict[str, Any]:
    context = config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if not name.endswith(".window")}


def basis_of_heads(folder: Path) -> Path:
    """Means that tell layers and heads: layer + head / 2."""
    path = folder / "basis.safetensors"
    heads = torch.arange(2).view(2, 1) / 2
    matrices = torch.eye(64).expand(2, 64, 64).contiguous()
    layers = {}
    for i in range(8):
        mean = (1 + i + heads).expand(2, 64).contiguous()
        layers[i] = LayerBasis(matrices, matrices, mean, mean, mean, mean)
    write_basis(path, layers, 8, "a-model")
    return path


def test_four_ranks_over_two_heads_hold_each_twice(tmp_path, become):
    """A rank's basis is of the head whose weights vLLM's own loader gives it."""
    settings = {"basis": str(basis_of_heads(tmp_path))}
    held, loaded = [], []
    weights = torch.arange(2.0).repeat_interleave(64).view(128, 1).expand(128, 8).contiguous()
    for index in range(4):
        become(index, 4)
        config = rank(tmp_path, range(8), settings, tensor_parallel_size=4)
        planned, _ = plan_cache(config, MEMORY)
        assert {group.kv_cache_spec.num_kv_heads for group in planned.kv_cache_groups} == {1}
        mean = layers_of(config)[layer_name(5)].impl.cache.basis.key_mean
        held.append(mean[:, 0].tolist())
        projection = linear.QKVParallelLinear(8, 64, 8, 2, bias=False)
        projection.weight_loader(projection.weight, weights, "k")
        loaded.append(projection.weight[2 * 64 : 3 * 64].unique().tolist())
    assert loaded == [[0], [0], [1], [1]]
    assert held == [[6 + head / 2] for (head,) in loaded]


def plan_pipeline(folder: Path, cut: int, **settings: Any) -> tuple[list[Any], list[KVCacheConfig]]:
    """Two stages, of the layers before ``cut`` and of those from it on."""
    stages = [
        rank(folder, layers, settings, pipeline_parallel_size=2)
        for layers in (range(cut), range(cut, 8))
    ]
    return stages, plan_ranks(stages, [MEMORY, 2 * MEMORY])


@pytest.mark.parametrize("cut", [4, 5])
def test_stages_of_a_pipeline_share_groups_and_blocks(tmp_path, cut):
    """Each stage keeps the rings of its own layers, in groups that all stages have."""
    stages, planned = plan_pipeline(tmp_path, cut)
    (whole,) = plan_ranks([rank(tmp_path, range(8), {})], [MEMORY])
    first, second = (plan.kv_cache_groups for plan in planned)
    assert planned[0].num_blocks == planned[1].num_blocks >= whole.num_blocks
    for mine, theirs, both in zip(first, second, whole.kv_cache_groups, strict=True):
        assert mine.kv_cache_spec == theirs.kv_cache_spec == both.kv_cache_spec
        assert sorted(mine.layer_names + theirs.layer_names) == sorted(both.layer_names)
    for stage, plan in zip(stages, planned, strict=True):
        names = {name for group in plan.kv_cache_groups for name in group.layer_names}
        assert names == set(stage.compilation_config.static_forward_context)
        layers = layers_of(stage)
        assert names == layers.keys() | {f"{name}.window" for name in layers}
        tensors = [name for tensor in plan.kv_cache_tensors for name in tensor.layers]
        assert sorted(tensors) == sorted(names)


def test_stages_of_a_pipeline_count_layers_of_the_whole_model(tmp_path):
    """``skip_layers`` and the basis name a layer of the model, whichever stage has it."""
    path = basis_of_heads(tmp_path)
    stages, planned = plan_pipeline(tmp_path, 4, basis=str(path), skip_layers=[1, -1])
    found = {name: layer.impl for stage in stages for name, layer in layers_of(stage).items()}
    assert list(found) == [layer_name(i) for i in range(8)]
    sparse = {i for i in range(8) if isinstance(found[layer_name(i)], SparseKVImpl)}
    assert sparse == {0, 2, 3, 4, 5, 6}
    for i in sparse:
        assert found[layer_name(i)].cache.basis.key_mean[:, 0].tolist() == [1 + i, 1.5 + i]
    assert planned[0].num_blocks == planned[1].num_blocks
    assert len({g.kv_cache_spec.page_size_bytes for p in planned for g in p.kv_cache_groups}) == 1


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("sparsekv.window", 112, 32),
        ("sparsekv.value_dtype", "int3", "int2"),
        ("vllm.__version__", VLLM_VERSION, "0.31.0"),
        ("vllm_sparsekv.__version__", vllm_sparsekv.__version__, "0.0.9"),
        ("page version", PAGE_VERSION, 0),
        ("sparsekv.of_another_version", None, True),
    ],
)
def test_ranks_that_differ_are_refused_with_both_values(tmp_path, monkeypatch, field, here, there):
    config = rank(tmp_path, range(1), {})
    monkeypatch.setattr(engine_layers, "of_ranks", lambda _, mine: [mine, mine | {field: there}])
    with pytest.raises(ValueError, match="must be the same on all nodes") as refused:
        plan_cache(config, MEMORY)
    assert f"{field}={here!r} here and {there!r} on another rank" in str(refused.value)
