"""Layers that stay dense on the platform's own backend, beside sparse ones: ``skip_layers`` and
drafters that cannot be sparse.

All groups of vLLM's block pool have pages of one size. A dense page must not be the larger one, or
every sparse page would be padded up to it: sparse blocks grow until the smallest dense block fits
their page, and dense blocks take as many tokens as fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_sparsekv.engine.compat import (
    AttentionBackend,
    AttentionSpec,
    VllmConfig,
    layer_index,
    platform_backend,
    replace_backend,
)
from vllm_sparsekv.format.layout import BLOCK_SIZE_MULTIPLE


def skipped_layers(
    skip: Sequence[int | str], vllm_config: VllmConfig, layers: dict[str, Any]
) -> dict[str, Any]:
    """The layers that ``skip`` names: indices, negative ones from the end, "sliding" and "full".

    A layer that reads another's cache goes with it.

    Raises:
        ValueError: an index or word names no attention layer of this rank's whole model, or no
            layer is left.
    """
    total = vllm_config.model_config.get_total_num_hidden_layers()
    indices = {index % total for index in skip if isinstance(index, int)}

    def chosen(name: str) -> bool:
        owner = layers[name].kv_sharing_target_layer_name or name
        kind = "full" if layers[owner].sliding_window is None else "sliding"
        return kind in skip or layer_index(owner) in indices

    skipped = {name: layer for name, layer in layers.items() if chosen(name)}
    if layers and len(skipped) == len(layers):
        raise ValueError(
            f"sparsekv.skip_layers={list(skip)}: must leave one of the {len(layers)} attention "
            f"layers sparse"
        )
    return skipped


def leave_dense(
    vllm_config: VllmConfig,
    skipped: dict[str, Any],
    others: dict[str, Any],
    sparse: dict[str, Any],
) -> None:
    """Give the skipped layers the platform's own backend, and choose block sizes.

    Args:
        others: layers on other backends.
    """
    if not skipped and not others:
        return
    token_bytes = max(
        layer.num_kv_heads * layer.attn_backend.format.token_bytes for layer in sparse.values()
    )
    backends = {name: platform_backend(vllm_config, layer) for name, layer in skipped.items()}
    backends |= {name: layer.attn_backend for name, layer in others.items()}
    layers = skipped | others
    dense = {name: (backend, dense_token_bytes(layers[name])) for name, backend in backends.items()}
    smallest = max(_block_size(backend, 0) * size for backend, size in dense.values())
    needed = math.ceil(smallest / token_bytes / BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE
    cache = vllm_config.cache_config
    if cache.block_size < needed:
        cache.block_size = needed
        if cache.mamba_page_size_padded is not None:
            cache.mamba_page_size_padded = needed * token_bytes
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = needed
    page = cache.block_size * token_bytes
    for name, (backend, size) in dense.items():
        fitting = _in_pages(backend, _block_size(backend, page // size), page)
        if name in skipped:
            replace_backend(vllm_config, skipped[name], fitting)
        else:
            others[name].attn_backend = fitting


def sparse_token_bytes(layer: Any) -> int:
    """What a token of the layer takes in sparse pages."""
    return layer.num_kv_heads * layer.impl.cache.format.token_bytes


def dense_token_bytes(layer: Any) -> int:
    """What a token of the layer takes in the model's dtype."""
    size = layer.head_size + layer.head_size_v
    return layer.num_kv_heads * size * layer.kv_cache_torch_dtype.itemsize


def _block_size(backend: type[AttentionBackend], largest: int) -> int:
    """The largest block that a backend reads unsplit, of those up to ``largest`` if there are."""
    sizes = []
    for size in backend.get_supported_kernel_block_sizes():
        if isinstance(size, int):
            sizes.append(size)
        else:
            sizes.append(size.base * max(1, largest // size.base))
    fitting = [size for size in sizes if size <= largest]
    return max(fitting) if fitting else min(sizes)


def _in_pages(
    backend: type[AttentionBackend], block_size: int, page: int
) -> type[AttentionBackend]:
    """The backend with blocks of ``block_size`` tokens in pages of ``page`` bytes."""

    def customize_spec(cls: type, spec: AttentionSpec) -> AttentionSpec:
        spec = backend.customize_spec(spec)
        return replace(spec, block_size=block_size, page_size_padded=page)

    return type(
        backend.__name__,
        (backend,),
        {"customize_spec": classmethod(customize_spec), "__module__": backend.__module__},
    )
