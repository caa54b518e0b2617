"""Drafters of a sparse engine: what vLLM derives for them, and what it plans."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning import Layer, build_layers, configure, layer_name, plan
from vllm.config import replace
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_sparsekv.engine import layers as engine_layers
from vllm_sparsekv.engine import report
from vllm_sparsekv.engine.backend import SparseKVBackend, SparseKVImpl
from vllm_sparsekv.engine.window import RingSpec
from vllm_sparsekv.format.basis import Basis, LayerBasis
from vllm_sparsekv.format.basis_file import write_basis

TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}
DRAFTER = TARGET | {"num_hidden_layers": 2, "head_dim": 32, "num_attention_heads": 8}
EAGLE = TARGET | {"num_hidden_layers": 1, "architectures": ["EagleLlamaForCausalLM"]}
SETTINGS = {"preset": "balanced", "basis": "none"}


def engine(folder: Path, drafter: dict[str, Any], settings: dict = SETTINGS, **given: Any) -> Any:
    """The configuration of an engine with a drafter."""
    path = folder / "drafter"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(drafter))
    method = "eagle" if drafter["architectures"] == EAGLE["architectures"] else "draft_model"
    return configure(
        folder,
        TARGET,
        max_model_len=2048,
        attention_backend="sparsekv",
        additional_config={"sparsekv": settings},
        speculative_config={"method": method, "model": str(path), "num_speculative_tokens": 3}
        | given,
    )


def derive(config: Any, **changes: Any) -> Any:
    """As model runner V1 derives a drafter's: its own attention backend."""
    attention = replace(config.attention_config, backend=None)
    return replace(config, attention_config=attention, **changes)


@pytest.fixture
def runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wants Triton when it runs; planning does not."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)


@pytest.fixture
def basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the target's layers and heads; what it says of a drafter's would be wrong."""
    for name, value in (("rank", 0), ("world_size", 1)):
        function = f"get_tensor_model_parallel_{name}"
        monkeypatch.setattr(engine_layers, function, lambda value=value: value)
    eyes, means = torch.eye(64).expand(2, 2, 64, 64), torch.zeros(2, 2, 64)
    path = tmp_path / "basis.safetensors"
    write_basis(path, dict.fromkeys(range(4), LayerBasis(*eyes, *means, *means + 1)), 4, "a-model")
    return str(path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of the start-up report."""
    lines: list[str] = []
    monkeypatch.setattr(report.logger, "info_once", lines.append)
    return lines


def build(config: Any, derived: Any, of_drafter: dict[int, Layer]) -> list[Any]:
    """The target's layers, then the drafter's; vLLM's runner V2 flags the latter."""
    build_layers(config, {i: Layer() for i in range(4)})
    drafted = build_layers(derived, of_drafter)
    for layer in drafted:
        layer.is_draft_layer = config.use_v2_model_runner
    return drafted


def groups_of(config: Any) -> list[Any]:
    return plan(config).groups.kv_cache_groups


@pytest.mark.parametrize("drafter", [DRAFTER, EAGLE])
def test_derived_configurations_are_recognised_in_every_process(tmp_path, basis, drafter):
    config = engine(tmp_path, drafter, {"basis": basis})
    for own in (config, pickle.loads(pickle.dumps(config))):
        for changes in ({}, {"model_config": own.speculative_config.draft_model_config}):
            derived = derive(own, **changes)
            assert derived.attention_config.backend is None
            assert own.cache_config.block_size == 64
        assert own.attention_config.backend is AttentionBackendEnum["SPARSEKV"]


def test_runner_v1_cannot_run_a_sparse_drafter(tmp_path):
    with pytest.raises(ValueError, match=r"speculative_config\.attention_backend names sparsekv"):
        engine(tmp_path, DRAFTER, attention_backend="sparsekv")


@pytest.mark.parametrize(("drafter", "layers"), [(DRAFTER, (4, 5)), (EAGLE, (4,))])
def test_dense_drafters_have_pages_like_ours(tmp_path, said, drafter, layers):
    config = engine(tmp_path, drafter)
    derived = derive(config, model_config=config.speculative_config.draft_model_config)
    drafted = build(config, derived, {i: Layer() for i in layers})
    groups = groups_of(config)
    names = {layer_name(i) for i in layers}
    (owner,) = [group for group in groups if names & set(group.layer_names)]
    assert set(owner.layer_names) == names
    # Runner V1 shows a draft model the first group; EAGLE is looked for in the last layer's.
    assert (owner is groups[0]) == (drafter is DRAFTER)
    context = list(config.compilation_config.static_forward_context)
    assert context[0 if drafter is DRAFTER else -1] in names
    (page,) = {group.kv_cache_spec.page_size_bytes for group in groups}
    for group in groups:
        if group.kv_cache_spec.dtype == torch.uint8:
            assert group.kv_cache_spec.unpadded_page_size_bytes == page
    assert all(not isinstance(layer.impl, SparseKVImpl) for layer in drafted)
    (line,) = [line for line in said if "drafter" in line]
    assert line == f"sparsekv: {len(layers)} layers of the drafter stay dense, on CPU_ATTN"


@pytest.mark.parametrize("tokens", [1, 7])
def test_rings_have_room_for_what_is_drafted(tmp_path, tokens):
    """The tokens of a step, and the one that a draft model reads twice."""
    config = engine(tmp_path, DRAFTER, num_speculative_tokens=tokens)
    derived = derive(config, model_config=config.speculative_config.draft_model_config)
    build(config, derived, {4: Layer(), 5: Layer()})
    (spec,) = {g.kv_cache_spec for g in groups_of(config) if isinstance(g.kv_cache_spec, RingSpec)}
    window = config.compilation_config.static_forward_context[
        layer_name(0)
    ].impl.cache.format.window
    assert window >= 64
    assert spec.min_slots == window + tokens + 1 <= spec.blocks_per_request * spec.num_states


def test_sparse_drafters_keep_to_themselves(tmp_path, basis, runner_v2, said):
    """Their shape, no basis of the target's, rings that vLLM takes for a drafter's."""
    config = engine(tmp_path, DRAFTER, {"preset": "capacity", "basis": basis, "skip_layers": [0]})
    derived = replace(config, model_config=config.speculative_config.draft_model_config)
    drafted = build(config, derived, {4: Layer(), 5: Layer()})
    made = plan(config)
    context = config.compilation_config.static_forward_context
    assert isinstance(context[layer_name(1)].impl, SparseKVImpl)
    assert not isinstance(context[layer_name(0)].impl, SparseKVImpl)
    assert context[layer_name(1)].impl.cache.basis.key.shape == (2, 64, 64)
    for layer in drafted:
        cache = layer.impl.cache
        assert cache.format.head_size == 32
        assert cache.basis is Basis.of(cache.format, config.device_config.device)
        assert cache.window.is_draft_layer and not context[f"{layer_name(1)}.window"].is_draft_layer
    specs = [group.kv_cache_spec for group in made.groups.kv_cache_groups]
    assert len({spec.page_size_bytes for spec in specs}) == 1
    (line,) = [line for line in said if "drafter" in line]
    assert line.startswith("sparsekv: 2 full-attention layers of the drafter: keys 0.0% asked")
    assert "int3; values" in line and "calibrated" not in line

    speculator = SimpleNamespace(
        vllm_config=config,
        attn_vllm_config=config,
        device=torch.device("cpu"),
        draft_attn_layer_names={layer_name(4), layer_name(5)},
        _configure_decode_metadata_update=lambda: None,
    )
    DraftModelSpeculator.set_attn(speculator, None, made.groups, None, None, None)
    found = {name for groups in speculator.attn_groups for g in groups for name in g.layer_names}
    assert found == {f"{layer_name(i)}{end}" for i in (4, 5) for end in ("", ".window")}


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        (SETTINGS, {"head_dim": 40}, "head_size=40: must be a positive multiple of 16"),
        ({"key_dtype": "int4_int2"}, {}, "sparsekv.basis='none': must be 'auto' or a file"),
    ],
)
def test_drafters_that_cannot_be_sparse_are_dense(
    tmp_path, basis, runner_v2, said, settings, changes, reason
):
    config = engine(tmp_path, DRAFTER | changes, {"basis": basis} | settings)
    derived = replace(config, model_config=config.speculative_config.draft_model_config)
    drafted = build(config, derived, {4: Layer(), 5: Layer()})
    groups = groups_of(config)
    assert all(not isinstance(layer.impl, SparseKVImpl) for layer in drafted)
    assert not issubclass(drafted[0].attn_backend, SparseKVBackend)
    assert any(isinstance(group.kv_cache_spec, RingSpec) for group in groups)
    (line,) = [line for line in said if "drafter" in line]
    assert line.startswith(f"sparsekv: 2 layers of the drafter stay dense, on CPU_ATTN; {reason}")


def test_unsupported_drafters_choose_no_sparse_backend(tmp_path, runner_v2):
    config = engine(tmp_path, DRAFTER | {"alibi": True})
    derived = replace(config, model_config=config.speculative_config.draft_model_config)
    assert derived.attention_config.backend is None
    assert config.attention_config.backend is AttentionBackendEnum["SPARSEKV"]


def test_reading_the_target_s_cache_is_refused(tmp_path):
    config = engine(tmp_path, EAGLE)
    build(config, derive(config), {4: Layer(shares=3)})
    with pytest.raises(ValueError, match=r"layers\.4\..* reads the cache of model\.layers\.3\."):
        plan(config)
