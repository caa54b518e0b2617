"""vLLM's layers: the built model's, their caches and their backends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.distributed import get_pp_group, get_tp_group
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized


def attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    """vLLM's ``Attention`` modules of the built model, by name, in order."""
    # Like every model's module imported after plugins have loaded.
    from vllm.model_executor.layers.attention import Attention

    return get_layers_from_vllm_config(vllm_config, Attention)


def of_ranks(vllm_config: VllmConfig, value: Any) -> list[Any]:
    """This rank's value and those of the ranks that share its layers or its heads."""
    found = [value]
    if vllm_config.parallel_config.world_size > 1:
        for group in (get_tp_group(), get_pp_group()):
            values = [None] * group.world_size
            torch.distributed.all_gather_object(values, value, group=group.cpu_group)
            found += values
    return found


def layer_index(layer_name: str) -> int:
    """Global index of the decoder layer in a module name."""
    # Every model's module is imported after plugins have loaded.
    from vllm.model_executor.models.utils import extract_layer_index

    return extract_layer_index(layer_name)


def layer_metadata(layer_name: str) -> Any:
    """This step's attention metadata of a layer; None in profiling runs."""
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, list):
        metadata = metadata[0]
    return None if metadata is None else metadata[layer_name]


def workspace(elements: int) -> torch.Tensor | None:
    """Float32 scratch of one step, out of vLLM's own; None for 0 elements and without a worker.

    Asked for in the profiling run, it is part of what vLLM sets aside; later calls of the same size
    return the same memory, also within CUDA graphs.
    """
    if not elements or not is_workspace_manager_initialized():
        return None
    return current_workspace_manager().get_simultaneous(((elements,), torch.float32))[0]


def state_pages(vllm_config: VllmConfig) -> list[tuple[int, int]]:
    """Bytes of a page and of the state in it, of each layer with a state (Mamba and its like)."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    specs = [
        layer.get_kv_cache_spec(vllm_config)
        for layer in layers.values()
        if layer.get_attn_backend().is_ssm()
    ]
    return [(spec.page_size_bytes, spec.real_page_size_bytes) for spec in specs]


def cache_specs(vllm_config: VllmConfig) -> list[tuple[Any, Any]]:
    """Specs of all layers with a cache of their own: as stored, and as the layer itself has it."""
    specs = []
    for layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).values():
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is not None and not getattr(layer, "kv_sharing_target_layer_name", None):
            specs.append((layer.get_attn_backend().customize_spec(spec), spec))
    return specs


def register_before(vllm_config: VllmConfig, companions: dict[str, AttentionLayerBase]) -> None:
    """Register cache layers, each before the layer it is named by; their names are their own."""
    context = vllm_config.compilation_config.static_forward_context
    layers = dict(context)
    context.clear()
    for name, layer in layers.items():
        if name in companions:
            context[companions[name].layer_name] = companions[name]
        context[name] = layer


def register_first(vllm_config: VllmConfig, names: Collection[str]) -> None:
    """Move layers to the front, so that their cache group is the first."""
    context = vllm_config.compilation_config.static_forward_context
    layers = dict(context)
    context.clear()
    context |= {name: layers.pop(name) for name in names} | layers


def platform_backend(vllm_config: VllmConfig, layer: Any) -> type[AttentionBackend]:
    """The backend the platform itself would choose for an attention layer."""
    attention = vllm_config.attention_config
    chosen, attention.backend = attention.backend, None
    cache = vllm_config.cache_config
    given, cache.user_specified_block_size = cache.user_specified_block_size, False
    try:
        with set_current_vllm_config(vllm_config):
            return get_attn_backend(
                layer.head_size,
                layer.dtype,
                layer.kv_cache_dtype,
                has_sink=layer.has_sink,
                attn_type=layer.attn_type,
                has_sliding_window=layer.sliding_window is not None,
            )
    finally:
        attention.backend, cache.user_specified_block_size = chosen, given


def replace_backend(vllm_config: VllmConfig, layer: Any, backend: type[AttentionBackend]) -> None:
    """Run an attention layer on ``backend``, built anew from what the layer is."""
    extra = {"sinks": layer.impl.sinks} if layer.has_sink else {}
    with set_current_vllm_config(vllm_config):
        layer.impl = backend.get_impl_cls()(*layer.impl.arguments, **extra)
    layer.attn_backend = backend
    layer.backend = AttentionBackendEnum[backend.get_name()]
    layer.impl.process_weights_after_loading(layer.dtype)


def output_projection(model: torch.nn.Module, layer: Any) -> torch.Tensor | None:
    """Wo, (hidden size, num_heads * D), of the linear layer that reads an attention layer's output.

    Taken from what the layer does to unit vectors, so it may be quantised. None where the module
    around the attention has no such layer, or several.
    """
    # Like every model's module imported after plugins have loaded.
    from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

    size = layer.num_heads * layer.head_size
    found = [
        child
        for module in model.modules()
        if any(child is layer for child in module.children())
        for child in module.children()
        if isinstance(child, (RowParallelLinear, ReplicatedLinear))
        and getattr(child, "input_size_per_partition", child.input_size) == size
    ]
    if len(found) != 1:
        return None
    unit = torch.eye(size, dtype=layer.dtype, device=next(model.parameters()).device)
    return found[0].quant_method.apply(found[0], unit, bias=None).mT
