"""What every attention layer of a built model gets: its format, its ring, or the dense backend.

vLLM builds layers without saying which they are; once the model is there, :func:`prepare` goes
over them by name. It runs in every worker, after weights have loaded and before vLLM plans the
cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import vllm_sparsekv
from vllm_sparsekv.engine import report
from vllm_sparsekv.engine.admission import layer_format, settings_of
from vllm_sparsekv.engine.backend import LayerCache, SparseKVBackend, SparseKVImpl
from vllm_sparsekv.engine.compat import (
    VLLM_VERSION,
    VllmConfig,
    attention_layers,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    layer_index,
    of_ranks,
    platform_backend,
    reads_first_group,
    register_before,
    register_first,
    replace_backend,
    show_drafters,
    zero_on_cpu,
)
from vllm_sparsekv.engine.skip import leave_dense, skipped_layers
from vllm_sparsekv.engine.window import WindowLayer
from vllm_sparsekv.format.basis import Basis, kv_heads_of_rank
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.fingerprint import PAGE_VERSION
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.api import implementation


def prepare(vllm_config: VllmConfig, choose_block_size: Callable[[], None]) -> None:
    """Prepare all attention layers of the model this process has built.

    Args:
        choose_block_size: vLLM's own choice, which asks backends for the size of their pages.

    Raises:
        ValueError: a layer needs what sparse pages do not support, or ranks differ; says which
            or in what.
        BuildError: ``SPARSEKV_KERNELS=native`` and they cannot be built.
    """
    _refuse_unequal_ranks(vllm_config)
    backends: dict[SparseFormat, type[SparseKVBackend]] = {}
    reasons = set()
    for name, layer in sparse_layers(vllm_config).items():
        try:
            _refuse_unsupported(name, layer)
            fmt = layer_format(vllm_config, layer.head_size, layer.is_draft_layer)
        except ValueError as reason:
            if not layer.is_draft_layer:
                raise
            reasons.add(str(reason))
            replace_backend(vllm_config, layer, platform_backend(vllm_config, layer))
        else:
            layer.attn_backend = backends.setdefault(fmt, SparseKVBackend.with_format(fmt))
    layers = sparse_layers(vllm_config)
    choose_block_size()
    if not layers:
        return
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not cache.user_specified_block_size and not model.is_hybrid:
        cache.block_size = layer_format(vllm_config, model.get_head_size()).default_block_size
    of_target = {name: layer for name, layer in layers.items() if not layer.is_draft_layer}
    skipped = skipped_layers(settings_of(vllm_config).skip_layers, vllm_config, of_target)
    sparse = {name: layer for name, layer in layers.items() if name not in skipped}
    others = _other_layers(vllm_config, layers)
    leave_dense(vllm_config, skipped, others, sparse)
    _add_caches(vllm_config, sparse)
    if reads_first_group(vllm_config):
        register_first(vllm_config, others)
    report.log_layers(vllm_config, sparse, skipped, others, reasons)
    implementation(vllm_config.device_config.device.type)  # compiled now, not for a first request


def sparse_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's ``Attention`` modules that run on this backend, by name, in order."""
    return {
        name: layer
        for name, layer in attention_layers(vllm_config).items()
        if isinstance(layer.impl, SparseKVImpl)
    }


def _refuse_unequal_ranks(vllm_config: VllmConfig) -> None:
    """Refuse nodes of other packages or settings; each node has its own of both."""
    settings = asdict(settings_of(vllm_config))
    if settings["basis_sha256"]:
        del settings["basis"]  # nodes may keep the same file in different places
    mine = {
        "vllm.__version__": VLLM_VERSION,
        "vllm_sparsekv.__version__": vllm_sparsekv.__version__,
        "page version": PAGE_VERSION,
        **{f"sparsekv.{name}": value for name, value in settings.items()},
    }
    for other in of_ranks(vllm_config, mine):
        # Of other versions the settings may have other names.
        for name in dict.fromkeys([*mine, *sorted(other)]):
            if mine.get(name) != other.get(name):
                raise ValueError(
                    f"{name}={mine.get(name)!r} here and {other.get(name)!r} on another "
                    f"rank of the engine: must be the same on all nodes"
                )


def _refuse_unsupported(name: str, layer: Any) -> None:
    """Refuse what admission cannot see in a model's configuration."""
    found = None
    if layer.attn_backend is not SparseKVBackend:
        found = f"attention of its own ({layer.attn_backend.__name__})"
    elif layer.head_size_v != layer.head_size:
        found = f"keys of {layer.head_size} elements and values of {layer.head_size_v}"
    if found:
        raise ValueError(f"attention_backend=sparsekv: {name} has {found}, which is not supported")


def _other_layers(vllm_config: VllmConfig, layers: dict[str, Any]) -> dict[str, Any]:
    """Attention layers with a cache of their own on other backends, as drafters may have.

    Raises:
        ValueError: one reads the cache of a sparse layer.
    """
    others = {}
    for name, layer in attention_layers(vllm_config).items():
        owner = layer.kv_sharing_target_layer_name
        if owner in layers and layer.is_draft_layer | (name not in layers):
            raise ValueError(
                f"attention_backend=sparsekv: {name} reads the cache of {owner}, a layer of "
                f"another model, which is not supported"
            )
        if name not in layers and not owner and layer.get_kv_cache_spec(vllm_config) is not None:
            others[name] = layer
    return others


def _add_caches(vllm_config: VllmConfig, sparse: dict[str, Any]) -> None:
    """Give each layer its cache, and vLLM the rings."""
    readers = defaultdict(list)
    for name, layer in sparse.items():
        readers[layer.kv_sharing_target_layer_name or name].append(name)
    file, rings = _open_basis(vllm_config), {}
    for name, layer in sparse.items():
        if layer.kv_sharing_target_layer_name:
            layer.impl.cache = sparse[layer.kv_sharing_target_layer_name].impl.cache
            continue
        fmt = layer.attn_backend.format.with_full_ring(vllm_config.cache_config.block_size)
        ring = WindowLayer(f"{name}.window", layer.num_kv_heads, fmt) if fmt.window else None
        if ring is not None:
            ring.is_draft_layer = layer.is_draft_layer
            rings[name] = ring
        layer.impl.cache = LayerCache(
            fmt, _basis(file, vllm_config, name, fmt), ring, readers[name][-1]
        )
    register_before(vllm_config, rings)
    zero_on_cpu(WindowLayer)
    show_drafters(WindowLayer)


def _open_basis(vllm_config: VllmConfig) -> BasisFile | None:
    """The file that admission has found, or its equal on this node.

    Raises:
        ValueError: no such file here, or another one than the engine was admitted with.
    """
    settings = settings_of(vllm_config)
    if settings.basis_path is None:
        return None
    return BasisFile.open(settings.basis_path, settings.basis_sha256)


def _basis(file: BasisFile | None, vllm_config: VllmConfig, name: str, fmt: SparseFormat) -> Basis:
    device = vllm_config.device_config.device
    if file is None or attention_layers(vllm_config)[name].is_draft_layer:
        return Basis.of(fmt, device)
    layer, index = attention_layers(vllm_config)[name], layer_index(name)
    found = file.layer(index)
    heads = kv_heads_of_rank(
        len(found.key),
        get_tensor_model_parallel_rank(),
        get_tensor_model_parallel_world_size(),
    )
    found = found.of_heads(heads)
    if found.key_mean.shape != (layer.num_kv_heads, layer.head_size):
        raise ValueError(
            f"sparsekv.basis={str(file.path)!r}: layer {index} has (KV heads, head size) "
            f"{tuple(found.key_mean.shape)} for this rank, must be "
            f"{(layer.num_kv_heads, layer.head_size)} for {name}"
        )
    if not layer.impl.takes_means and (found.key_mean.any() or found.value_mean.any()):
        raise ValueError(
            f"sparsekv.basis={str(file.path)!r}: layer {index} has means, which attention with "
            f"sinks or a soft-cap cannot have, as {name} has"
        )
    return Basis.calibrated(fmt, found, device)
