"""What an engine must look like to run on sparse pages, checked before weights load."""

from __future__ import annotations

import difflib
from typing import Any

from vllm_sparsekv.engine.compat import VllmConfig, lookahead_tokens
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.settings import SparseKVConfig

SETTINGS_KEY = "sparsekv"
DEFAULT_BLOCK_SIZE = 64


def settings_of(vllm_config: VllmConfig) -> SparseKVConfig:
    """The user's validated settings, ``additional_config["sparsekv"]``.

    Raises:
        ValueError: names the field, the value and the valid set.
    """
    given = _additional(vllm_config)
    for name in given:
        if name != SETTINGS_KEY and difflib.get_close_matches(name, [SETTINGS_KEY]):
            raise ValueError(f"additional_config[{name!r}]: did you mean {SETTINGS_KEY!r}?")
    return SparseKVConfig.from_dict(given.get(SETTINGS_KEY))


def refuse_unused_settings(vllm_config: VllmConfig) -> None:
    """Refuse settings for sparse pages on an engine that uses another attention backend."""
    if SETTINGS_KEY in _additional(vllm_config):
        raise ValueError(
            f"additional_config[{SETTINGS_KEY!r}] is set but attention_backend="
            f"{vllm_config.attention_config.backend}: must be 'sparsekv'"
        )


def layer_format(vllm_config: VllmConfig, head_size: int) -> SparseFormat:
    """The cache format of a layer with this head size."""
    return SparseFormat.from_config(
        settings_of(vllm_config),
        head_size,
        vllm_config.model_config.dtype,
        lookahead_tokens(vllm_config),
    )


def admit(vllm_config: VllmConfig) -> None:
    """Refuse what sparse pages do not support and choose the block size.

    Raises:
        ValueError: names the field, the value and the valid set.
    """
    settings = settings_of(vllm_config)
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    if model is None:
        return
    unsupported = {
        "MLA": model.use_mla,
        "encoder-decoder attention": model.is_encoder_decoder,
        "Mamba and linear-attention layers": model.is_hybrid or model.is_attention_free,
        "sliding-window layers": model.get_sliding_window() is not None
        or _has_sliding_layers(model.hf_text_config),
    }
    for what, present in unsupported.items():
        if present:
            raise ValueError(
                f"attention_backend=sparsekv: {model.model} has {what}, supported are decoder "
                f"models with full attention in every layer"
            )
    if cache.cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r}: must be 'auto' with "
            f"attention_backend=sparsekv; sparsekv.key_dtype and sparsekv.value_dtype quantise"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "disable_hybrid_kv_cache_manager=True: must be False with attention_backend=sparsekv, "
            "pages and window are two cache groups"
        )
    if not cache.user_specified_block_size:
        cache.block_size = DEFAULT_BLOCK_SIZE
    layer_format(vllm_config, model.get_head_size()).slots_per_block(cache.block_size)
    if settings.basis is not None:
        _check_basis(settings.basis, model)


def _check_basis(path: str, model: Any) -> None:
    """Refuse a basis calibrated on a model of another shape."""
    basis = BasisFile.open(path)
    needed = {
        "head_size": model.get_head_size(),
        "num_layers": model.get_total_num_hidden_layers(),
        "num_kv_heads": model.get_total_num_kv_heads(),
    }
    for name, value in needed.items():
        if getattr(basis, name) != value:
            raise ValueError(
                f"sparsekv.basis={path!r}: its {name} is {getattr(basis, name)} (calibrated on "
                f"{basis.model}), must be {value} for {model.model}"
            )


def _additional(vllm_config: VllmConfig) -> dict[str, Any]:
    """``additional_config`` as the user gave it; vLLM also allows an opaque object there."""
    given = vllm_config.additional_config
    return given if isinstance(given, dict) else {}


def _has_sliding_layers(hf_text_config: object) -> bool:
    layer_types = getattr(hf_text_config, "layer_types", None) or ()
    return any("sliding" in layer_type for layer_type in layer_types)
