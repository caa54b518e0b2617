"""What vLLM plans for the layers of real models' shapes, prepared by this package."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planning import Layer, StateLayer, build_layers, configure, layer_name, plan
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_sparsekv.engine import report
from vllm_sparsekv.engine.backend import SparseKVBackend, SparseKVImpl
from vllm_sparsekv.engine.window import RingSpec, WindowLayer
from vllm_sparsekv.kernels import api

SPARSE: dict[str, Any] = {
    "attention_backend": "sparsekv",
    "additional_config": {"sparsekv": {"preset": "balanced"}},
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 131072,
}
GEMMA_27B = LLAMA_8B | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 62,
    "num_key_value_heads": 16,
    "sliding_window": 1024,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(62)],
}
GPT_OSS = LLAMA_8B | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
}
QWEN3_NEXT = LLAMA_8B | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
}
JAMBA = LLAMA_8B | {
    "architectures": ["JambaForCausalLM"],
    "model_type": "jamba",
    "num_hidden_layers": 32,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 256,
}
GRANITE_4 = LLAMA_8B | {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 40,
    "hidden_size": 4096,
    "mamba_n_heads": 128,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "layer_types": (["mamba"] * 9 + ["attention"]) * 4,
}
LFM2 = LLAMA_8B | {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "conv_dim": 2048,
    "conv_L_cache": 3,
    "head_dim": 64,
    "layer_types": ["conv", "conv", "full_attention", "conv"] * 4,
}


def layers_of(model: dict[str, Any]) -> dict[int, Layer]:
    kinds = model.get("layer_types", ["full_attention"] * model["num_hidden_layers"])
    if model["model_type"] == "jamba":
        kinds = ["attention" if i % 8 == 4 else "mamba" for i in range(model["num_hidden_layers"])]
    windows = {"sliding_attention": model.get("sliding_window"), "full_attention": None}
    windows["attention"] = None
    return {i: Layer(windows[kind]) for i, kind in enumerate(kinds) if kind in windows}


def planned(folder: Path, model: dict[str, Any], settings: dict[str, Any] | None, **options: Any):
    """The plan for all layers of a model, dense without settings."""
    if settings is not None:
        options |= SPARSE | {"additional_config": {"sparsekv": {"preset": "balanced"} | settings}}
    config = configure(folder, model, **options)
    attention = layers_of(model)
    build_layers(config, attention)
    for index in range(model["num_hidden_layers"]):
        if index not in attention:
            StateLayer(config, index)
    return plan(config)


@pytest.mark.parametrize("length", [32768, 131072])
def test_capacity_of_a_model_of_gemma_3_27b_s_shape(tmp_path, length):
    dense = planned(tmp_path, GEMMA_27B, None, max_model_len=length)
    sparse = planned(tmp_path, GEMMA_27B, {}, max_model_len=length)
    assert sparse.tokens >= 4.2 * dense.tokens


@pytest.mark.parametrize("model", [GEMMA_27B, GPT_OSS, LLAMA_8B], ids=lambda m: m["model_type"])
def test_groups_of_models_without_state_layers(tmp_path, model):
    """Pages under vLLM's own kinds of group, rings in groups of their own, all pages one size."""
    groups = planned(tmp_path, model, {}, max_model_len=8192).groups.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    kinds = {type(spec) for spec in specs}
    sliding = "sliding_attention" in model.get("layer_types", ())
    assert kinds == {RingSpec, FullAttentionSpec} | ({SlidingWindowSpec} if sliding else set())
    assert len({spec.page_size_bytes for spec in specs}) == 1
    assert {spec.block_size for spec in specs} == {64}
    names = [name for group in groups for name in group.layer_names]
    layers = [layer_name(i) for i in layers_of(model)]
    assert sorted(names) == sorted(layers + [f"{name}.window" for name in layers])
    for spec in specs:
        if isinstance(spec, SlidingWindowSpec):
            assert spec.sliding_window == model["sliding_window"]
        if isinstance(spec, RingSpec):
            # As many slots as fit a page; the window fills them.
            slot = spec.num_kv_heads * spec.state_content_bytes
            assert spec.num_states == spec.page_size_bytes // slot
            assert spec.min_slots == spec.blocks_per_request * spec.num_states >= 64


@pytest.mark.parametrize(
    "model", [QWEN3_NEXT, JAMBA, GRANITE_4, LFM2], ids=lambda m: m["model_type"]
)
def test_blocks_beside_state_layers_grow_from_our_bytes(tmp_path, model):
    """A page is as small as the state allows, in multiples of 16 tokens of ours."""
    made = planned(tmp_path, model, {}, max_model_len=8192)
    specs = [group.kv_cache_spec for group in made.groups.kv_cache_groups]
    assert {type(spec) for spec in specs} == {RingSpec, FullAttentionSpec, MambaSpec}
    assert len({spec.page_size_bytes for spec in specs}) == 1
    (pages,) = {spec for spec in specs if isinstance(spec, FullAttentionSpec)}
    state = next(spec for spec in specs if isinstance(spec, MambaSpec)).real_page_size_bytes
    token = pages.num_kv_heads * pages.state_content_bytes
    assert pages.page_size_bytes == pages.block_size * token >= state
    assert pages.block_size == 64 or pages.page_size_bytes - 64 * token < state
    assert made.config.cache_config.block_size == pages.block_size
    (line,) = [line for line in report.lines(made.config, {}, {}, {}, ()) if "state layers" in line]
    count = model["num_hidden_layers"] - len(layers_of(model))
    padding = pages.page_size_bytes / state - 1
    assert line == (
        f"sparsekv: {count} state layers stay vLLM's, in pages of {pages.block_size} tokens of "
        f"ours padded by {padding:.1%}"
    )


def test_layers_of_several_head_sizes_share_pages(tmp_path):
    """As in Gemma 4: sliding layers of 256 elements and 8 heads, full ones of 512 and 2."""
    config = configure(tmp_path, GEMMA_27B, max_model_len=8192, **SPARSE)
    layers = {i: Layer(None, 512, 2) if i % 6 == 5 else Layer(1024, 256, 8) for i in range(12)}
    built = build_layers(config, layers)
    specs = [group.kv_cache_spec for group in plan(config).groups.kv_cache_groups]
    assert len({spec.page_size_bytes for spec in specs}) == 1
    by_size = {layer.head_size: layer.attn_backend.format for layer in built}
    assert {size: fmt.head_size for size, fmt in by_size.items()} == {256: 256, 512: 512}
    for spec in specs:
        assert spec.page_size_bytes >= spec.num_heads * spec.num_states * spec.state_content_bytes
        if isinstance(spec, RingSpec):
            assert spec.blocks_per_request * spec.num_states >= spec.min_slots


def test_two_engines_of_one_process_keep_their_formats(tmp_path):
    """vLLM asks a backend for the page size without saying for which engine."""
    made = []
    for preset in ("quality", "capacity"):
        options = SPARSE | {"additional_config": {"sparsekv": {"preset": preset}}}
        config = configure(tmp_path, LLAMA_8B, max_model_len=8192, **options)
        made.append((config, build_layers(config, {0: Layer()})))
    widths = []
    for config, (layer,) in made:
        plan(config)
        spec = layer.get_kv_cache_spec(config)
        widths.append(layer.get_attn_backend().customize_spec(spec).state_content_bytes)
    assert widths == [2 * 66, 2 * 50]


def test_a_layer_that_reads_another_s_cache(tmp_path):
    """It has no pages and no ring; the last reader fills the window."""
    config = configure(tmp_path, LLAMA_8B, max_model_len=8192, **SPARSE)
    first, second, third = build_layers(config, {0: Layer(), 1: Layer(), 2: Layer(shares=0)})
    names = [name for group in plan(config).groups.kv_cache_groups for name in group.layer_names]
    assert layer_name(2) not in names and f"{layer_name(2)}.window" not in names
    assert third.impl.cache is first.impl.cache
    assert first.impl.cache.last_reader == layer_name(2)
    assert second.impl.cache.last_reader == layer_name(1)


def test_rings_come_before_their_layers(tmp_path):
    """vLLM takes the last registered layer for one of the model's own."""
    config = configure(tmp_path, LLAMA_8B, max_model_len=8192, **SPARSE)
    build_layers(config, {0: Layer(), 1: Layer()})
    plan(config)
    context = config.compilation_config.static_forward_context
    assert list(context) == [
        name for i in range(2) for name in (f"{layer_name(i)}.window", layer_name(i))
    ]
    assert isinstance(context[f"{layer_name(1)}.window"], WindowLayer)


def test_new_blocks_are_zeroed_in_rings_whatever_the_other_groups(tmp_path):
    """vLLM's CPU runner zeroes full-attention groups; here there are none."""
    config = configure(tmp_path, GEMMA_27B, max_model_len=8192, **SPARSE)
    build_layers(config, {0: Layer(1024)})
    made = plan(config)
    ring = config.compilation_config.static_forward_context[f"{layer_name(0)}.window"]
    ring.kv_cache = torch.ones(6, 16, 3, ring.format.slot_elements, dtype=torch.bfloat16)
    runner = SimpleNamespace(
        kv_cache_config=made.groups, compilation_config=config.compilation_config
    )
    CPUModelRunner._zero_block_ids(runner, [2, 4])
    emptied = ring.format.slots(ring.kv_cache).tag.eq(0).flatten(1)
    assert emptied.all(1).tolist() == [False, False, True, False, True, False]
    assert emptied.any(1).tolist() == emptied.all(1).tolist()


@pytest.mark.parametrize("user", [None, 128])
def test_block_size_is_64_or_the_user_s(tmp_path, user):
    config = configure(tmp_path, LLAMA_8B, max_model_len=8192, block_size=user, **SPARSE)
    build_layers(config, {0: Layer()})
    specs = [group.kv_cache_spec for group in plan(config).groups.kv_cache_groups]
    assert {spec.block_size for spec in specs} == {user or 64}


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        ([0, -1], {0, 61}),
        (["full"], {i for i in range(62) if i % 6 == 5}),
        (["sliding", 5], {i for i in range(62) if i % 6 != 5} | {5}),
        ([], set()),
    ],
)
def test_skipped_layers_are_the_platform_s_in_pages_like_ours(tmp_path, skip, dense):
    settings = {"preset": "balanced", "skip_layers": skip}
    options = SPARSE | {"additional_config": {"sparsekv": settings}}
    config = configure(tmp_path, GEMMA_27B, max_model_len=32768, **options)
    layers = build_layers(config, layers_of(GEMMA_27B))
    own = build_layers(configure(tmp_path, GEMMA_27B), layers_of(GEMMA_27B))
    made = plan(config)
    for i, (layer, like) in enumerate(zip(layers, own, strict=True)):
        assert issubclass(layer.attn_backend, SparseKVBackend) == (i not in dense)
        if i in dense:
            assert type(layer.impl) is type(like.impl)
            assert layer.impl.sliding_window == like.impl.sliding_window
            assert layer.backend is like.backend
    specs = [group.kv_cache_spec for group in made.groups.kv_cache_groups]
    (page,) = {spec.page_size_bytes for spec in specs}
    for spec in specs:
        if spec.dtype == torch.bfloat16 and not isinstance(spec, RingSpec):
            # As many tokens as fit a page whose size is ours, no kernel block is cut.
            assert spec.unpadded_page_size_bytes <= page < 1.1 * spec.unpadded_page_size_bytes
            assert spec.block_size % 32 == 0
    ours = [spec for spec in specs if spec.dtype == torch.uint8]
    assert {spec.unpadded_page_size_bytes for spec in ours} == {page}


def test_skipping_no_layer_or_a_few_costs_what_is_said(tmp_path):
    lines = {}
    for skip in ((), (0, 1, -2, -1)):
        settings = {"preset": "balanced", "skip_layers": skip}
        options = SPARSE | {"additional_config": {"sparsekv": settings}}
        config = configure(tmp_path, LLAMA_8B, max_model_len=32768, **options)
        layers = build_layers(config, layers_of(LLAMA_8B))
        tokens = plan(config).tokens
        named = {layer.layer_name: layer for layer in layers}
        sparse = {n: x for n, x in named.items() if isinstance(x.impl, SparseKVImpl)}
        skipped = {n: x for n, x in named.items() if n not in sparse}
        lines[skip] = report.lines(config, sparse, skipped, {}, ()), tokens
    full, all_tokens = lines[()]
    fewer, some_tokens = lines[0, 1, -2, -1]
    assert len(full) == 1 and len(fewer) == 2
    assert fewer[1].startswith(
        "sparsekv: 4 layers stay dense (skip_layers): a request of 32768 tokens takes about "
    )
    said = float(fewer[1].partition("about ")[2].partition("x")[0])
    assert said > 1.3 and abs(all_tokens / some_tokens - said) < 0.1 * said


def test_lines_by_kind_of_layer(tmp_path):
    settings = {"key_sparsity": 0.3, "key_dtype": "auto", "value_sparsity": 0.5}
    settings |= {"value_dtype": "fp8", "window": 32}
    options = SPARSE | {"additional_config": {"sparsekv": settings}}
    config = configure(tmp_path, GPT_OSS, max_model_len=8192, **options)
    layers = build_layers(config, layers_of(GPT_OSS) | {24: Layer(shares=23)})
    plan(config)
    lines = report.lines(config, {layer.layer_name: layer for layer in layers}, {}, {}, ())
    vectors = (
        "keys 30.0% asked, 25.0% effective, auto; values 50.0% asked, 50.0% effective, fp8; "
        "1152 bytes per token and layer against 2048 dense (1.78x); window 34 tokens (32 asked); "
        "block size 64"
    )
    assert lines == [
        f"sparsekv: 12 sliding-window layers (128 tokens): {vectors}",
        f"sparsekv: 12 full-attention layers: {vectors}",
        "sparsekv: 1 layers read the cache of another",
    ]
    assert isinstance(report.logger, logging.Logger)


def test_layers_of_another_kind_are_refused_by_name(tmp_path):
    config = configure(tmp_path, LLAMA_8B, max_model_len=8192, **SPARSE)
    build_layers(config, {3: Layer()}, head_size_v=64)
    wanted = r"layers\.3\.self_attn\.attn has keys of 128 elements and values of 64, which is not"
    with pytest.raises(ValueError, match=wanted):
        plan(config)
    config = configure(tmp_path, LLAMA_8B, max_model_len=8192, **SPARSE)

    class Chunked(ChunkedLocalAttention, Attention):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, attention_chunk_size=128, **kwargs)

    build_layers(config, {3: Layer()}, Chunked)
    with pytest.raises(ValueError, match=r"attn has attention of its own \(ChunkedLocalAtt"):
        plan(config)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"alibi_slopes": [0.5]}, True),
        ({"sinks": None}, False),
        ({"chunk_lookback": -1, "use_alibi_sqrt": False}, False),
        ({"chunk_lookback": 2}, True),
        ({"block_m": 64}, True),
    ],
)
def test_options_that_change_nothing_are_accepted(options, refused):
    if not refused:
        SparseKVImpl(4, 64, 0.125, **options)
        return
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*not supported by attention_backend=sparsekv"):
        SparseKVImpl(4, 64, 0.125, **options)


def test_kernels_are_there_before_the_first_request(tmp_path: Path) -> None:
    config = configure(tmp_path, LLAMA_8B, **SPARSE)
    build_layers(config, {0: Layer()})
    api.implementation.cache_clear()
    plan(config)
    assert api.implementation.cache_info().misses == 1
    api.implementation("cpu")
    assert api.implementation.cache_info().misses == 1
