"""vLLM's cache planning for models of any shape, without their weights.

Attention layers are built as models build them, prepared as a worker prepares them, and planned by
vLLM's own code for a memory of this many bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models import ModelRegistry
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from vllm_sparsekv.engine.compat import plan_cache


class Plan(NamedTuple):
    """What vLLM planned.

    Attributes:
        config: the engine's configuration.
        groups: its cache groups.
        tokens: KV cache size as vLLM reports it.
    """

    config: Any
    groups: KVCacheConfig
    tokens: int


def configure(folder: Path, model: dict[str, Any], **options: Any) -> Any:
    """vLLM's configuration of an engine for a model described by its ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model))
    options = {"skip_tokenizer_init": True, "dtype": "bfloat16"} | options
    return EngineArgs(model=str(folder), **options).create_engine_config()


class Layer(NamedTuple):
    """A decoder layer's attention; what is None is the model's.

    Attributes:
        window: of a sliding-window layer.
        shares: index of the layer whose keys and values it reads.
    """

    window: int | None = None
    head_size: int | None = None
    num_kv_heads: int | None = None
    shares: int | None = None


def layer_name(index: int) -> str:
    return f"model.layers.{index}.self_attn.attn"


def build_layers(
    config: Any, layers: Mapping[int, Layer], kind: type[Attention] = Attention, **options: Any
) -> list[Attention]:
    """Attention layers as a model builds them, by decoder layer."""
    model = config.model_config
    built = []
    with set_current_vllm_config(config), set_default_torch_dtype(model.dtype):
        for index, layer in layers.items():
            size = layer.head_size or model.get_head_size()
            if layer.window is not None:
                options |= {"per_layer_sliding_window": layer.window}
            if layer.shares is not None:
                options |= {"kv_sharing_target_layer_name": layer_name(layer.shares)}
            built.append(
                kind(
                    model.get_num_attention_heads(config.parallel_config),
                    size,
                    size**-0.5,
                    num_kv_heads=layer.num_kv_heads
                    or model.get_num_kv_heads(config.parallel_config),
                    cache_config=config.cache_config,
                    prefix=layer_name(index),
                    **options,
                )
            )
            options.pop("per_layer_sliding_window", None)
            options.pop("kv_sharing_target_layer_name", None)
    return built


class StateLayer(torch.nn.Module, AttentionLayerBase):
    """A layer with the state that the configuration's model class declares."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        model = config.model_config
        cls, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
        self.shapes = cls.get_mamba_state_shape_from_config(config)
        self.dtypes = cls.get_mamba_state_dtype_from_config(config)
        name = f"model.layers.{index}.mixer"
        config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> Any:
        return Mamba2AttentionBackend

    def get_kv_cache_spec(self, config: Any) -> MambaSpec:
        return MambaSpec(
            block_size=config.cache_config.mamba_block_size,
            shapes=self.shapes,
            dtypes=self.dtypes,
            page_size_padded=config.cache_config.mamba_page_size_padded,
        )


def plan(config: Any, memory: int = 1 << 34) -> Plan:
    """Prepare the layers that were built and plan their cache."""
    return Plan(config, *plan_cache(config, memory))
