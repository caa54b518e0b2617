"""``sparsekv inspect MODEL``: what a model's cache takes with every preset, without its weights."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from vllm_sparsekv.engine.admission import SETTINGS_KEY
from vllm_sparsekv.engine.auto_basis import basis_path, positions
from vllm_sparsekv.engine.compat import (
    VllmConfig,
    attention_layers,
    build_without_weights,
    engine_config,
    parse_engine_options,
    plan_cache,
    single_worker,
    state_pages,
)
from vllm_sparsekv.engine.layers import sparse_layers
from vllm_sparsekv.engine.skip import sparse_token_bytes
from vllm_sparsekv.engine.table import aligned
from vllm_sparsekv.settings import CALIBRATED_DEFAULT, PRESETS, SparseKVConfig

GIB = 1 << 30
MOST_MEMORY = 1 << 20
"""GiB, more than any machine has."""


@dataclass(frozen=True)
class Layers:
    """Attention layers of one kind.

    Attributes:
        count: layers that have a cache of their own.
        sliding_window: tokens they see; None for all.
        num_kv_heads: of each.
        head_size: D.
    """

    count: int
    sliding_window: int | None
    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Cache:
    """What one preset stores.

    Attributes:
        preset: its name; "dense" for vLLM's own cache.
        stored: what keys and values become, in a basis where the preset has one.
        token_bytes: bytes of a token in all attention layers, without the window.
        ratio: of the dense cache's ``token_bytes`` to them.
        block_size: tokens of a page.
        window: newest tokens of a request that stay whole, at least, in every layer.
        window_dtype: of their elements.
        ring_bytes: that a request's windows take in all layers.
        tokens: KV cache size in the memory asked for, as vLLM reports it; None where it does not
            hold one request of ``max_model_len``.
    """

    preset: str
    stored: str
    token_bytes: int
    ratio: float
    block_size: int
    window: int
    window_dtype: str
    ring_bytes: int
    tokens: int | None


@dataclass(frozen=True)
class Inspection:
    """What ``sparsekv inspect`` found.

    Attributes:
        model, dtype, max_model_len: of the engine.
        memory: bytes of the KV cache that ``tokens`` of each cache are for.
        layers: the attention layers, by kind.
        sharing: layers that read the cache of another.
        states: layers with a state instead of keys and values.
        calibration: file of the basis the engine would find; None where the first start makes it.
        caches: the dense one, then one for every preset.
    """

    model: str
    dtype: str
    max_model_len: int
    memory: int
    layers: list[Layers]
    sharing: int
    states: int
    calibration: str | None
    caches: list[Cache]


def inspect(options: dict[str, Any], memory: int) -> Inspection:
    """Plan a model's cache with every preset.

    Args:
        options: vLLM's engine options, ``model`` among them.
        memory: bytes of the KV cache.

    Raises:
        ValueError: vLLM or this package does not serve the model.
    """
    # The weights are not read: dummies would be theirs.
    options = options | {"load_format": "dummy", "skip_tokenizer_init": True}
    with single_worker():
        config = engine_config(options)
        build_without_weights(config)
        layers = attention_layers(config).values()
        owners = [layer for layer in layers if not layer.kv_sharing_target_layer_name]
        kinds = Counter((x.sliding_window, x.num_kv_heads, x.head_size) for x in owners)
        bytes_of = 2 * config.model_config.dtype.itemsize
        dense_bytes = sum(layer.num_kv_heads * layer.head_size * bytes_of for layer in owners)
        tokens = _tokens(config, memory)
        dtype = str(config.model_config.dtype).removeprefix("torch.")
        block_size = config.cache_config.block_size
        caches = [Cache("dense", dtype, dense_bytes, 1.0, block_size, 0, dtype, 0, tokens)]
        caches += [_sparse(options, name, dense_bytes, memory) for name in PRESETS]
        path = basis_path(config, positions(config), SparseKVConfig.calibration_tokens)
        return Inspection(
            model=config.model_config.model,
            dtype=dtype,
            max_model_len=config.model_config.max_model_len,
            memory=memory,
            layers=[Layers(count, *kind) for kind, count in kinds.items()],
            sharing=len(layers) - len(owners),
            states=len(state_pages(config)),
            calibration=str(path) if path.exists() else None,
            caches=caches,
        )


def _sparse(options: dict[str, Any], preset: str, dense_bytes: int, memory: int) -> Cache:
    settings = {"preset": preset, "basis": "none"}
    sparse = {"attention_backend": "sparsekv", "additional_config": {SETTINGS_KEY: settings}}
    config = engine_config(options | sparse)
    # As with a basis, which has a say in how vectors are stored but not in what they take.
    admitted = config.additional_config[SETTINGS_KEY] | {"basis": "auto"}
    config.additional_config = {SETTINGS_KEY: admitted}
    build_without_weights(config)
    tokens = _tokens(config, memory)
    layers = [x for x in sparse_layers(config).values() if not x.kv_sharing_target_layer_name]
    caches = [layer.impl.cache for layer in layers]
    token_bytes = sum(map(sparse_token_bytes, layers))
    rings = [cache.window.get_kv_cache_spec(config) for cache in caches if cache.window]
    return Cache(
        preset=preset,
        stored=SparseKVConfig.from_dict(admitted).vectors,
        token_bytes=token_bytes,
        ratio=round(dense_bytes / token_bytes, 3),
        block_size=config.cache_config.block_size,
        window=min(cache.format.window for cache in caches),
        window_dtype=str(caches[0].format.window_dtype).removeprefix("torch."),
        ring_bytes=sum(ring.max_memory_usage_bytes(config) for ring in rings),
        tokens=tokens,
    )


def _tokens(config: VllmConfig, memory: int) -> int | None:
    try:
        return plan_cache(config, memory)[1]
    except ValueError as error:
        if not any(said in str(error) for said in ("KV cache", "memory for the cache blocks")):
            raise
        return None


def describe(found: Inspection) -> str:
    """The report for people."""
    lines = [f"{found.model}, {found.dtype}, max_model_len {found.max_model_len:,}"]
    for kind in found.layers:
        seen = "full attention" if kind.sliding_window is None else "sliding window"
        if kind.sliding_window is not None:
            seen += f" of {kind.sliding_window:,} tokens"
        lines.append(
            f"  {kind.count} layers of {seen}: {kind.num_kv_heads} KV heads of {kind.head_size}"
        )
    if found.sharing:
        lines.append(f"  {found.sharing} layers read the cache of another")
    if found.states:
        lines.append(f"  {found.states} layers with a state, which stays vLLM's")
    lines += ["", f"calibration: {found.calibration or 'none yet, the first start makes it'}", ""]
    dense = found.caches[0].tokens
    rows = [
        (
            "preset",
            "bytes/token",
            "ratio",
            "block",
            "window",
            "ring bytes",
            "tokens",
            "vs dense",
            "stored",
        )
    ]
    for cache in found.caches:
        more = f"{cache.tokens / dense:.2f}x" if cache.tokens and dense else ""
        rows.append(
            (
                cache.preset + " *" * (cache.preset == CALIBRATED_DEFAULT),
                f"{cache.token_bytes:,}",
                f"{cache.ratio:.2f}x",
                f"{cache.block_size}",
                f"{cache.window} {cache.window_dtype}" if cache.window else "0",
                f"{cache.ring_bytes:,}",
                "-" if cache.tokens is None else f"{cache.tokens:,}",
                more,
                cache.stored,
            )
        )
    lines += [aligned(rows, left=(0, 8)), ""]
    lines.append(
        f"* the default. Bytes of all layers, without the window; ring bytes of a request; "
        f"tokens in {found.memory / GIB:g} GiB."
    )
    if any(cache.tokens is None for cache in found.caches):
        lines.append("- not one request of max_model_len: more --memory, less --max-model-len.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sparsekv inspect",
        description="Say what a model's cache takes with every preset, without reading weights. "
        "Further options are vLLM's engine options, as for `vllm serve`.",
    )
    parser.add_argument("model", help="as for `vllm serve`")
    parser.add_argument(
        "--memory", type=float, default=1.0, help="GiB of the KV cache (default 1)", metavar="GIB"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args, rest = parser.parse_known_args(arguments)
    if not 0 < args.memory <= MOST_MEMORY:
        parser.error(f"--memory {args.memory:g}: must be > 0 and <= {MOST_MEMORY} (GiB)")
    options = parse_engine_options(["--model", args.model, *rest], prog=parser.prog)
    for name in ("additional_config", "attention_backend", "kv_cache_dtype"):
        if name in options:
            parser.error(f"--{name.replace('_', '-')}: every preset is shown, leave it out")
    found = inspect(options, round(args.memory * GIB))
    print(json.dumps(asdict(found), indent=2) if args.json else describe(found))
