"""What an engine must look like to run on sparse pages, checked before weights load."""

from __future__ import annotations

from vllm_sparsekv.config import SparseKVConfig
from vllm_sparsekv.format import SparseFormat
from vllm_sparsekv.vllm_compat import VllmConfig, lookahead_tokens

SETTINGS_KEY = "sparsekv"
DEFAULT_BLOCK_SIZE = 64


def settings_of(vllm_config: VllmConfig) -> SparseKVConfig:
    """The user's validated settings.

    Raises:
        ValueError: names the field, the value and the valid set.
    """
    return SparseKVConfig.from_dict(vllm_config.additional_config.get(SETTINGS_KEY))


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
    settings_of(vllm_config)
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    if model is None:
        return
    if model.use_mla:
        raise ValueError("attention_backend=sparsekv: models with MLA are not supported")
    if model.is_encoder_decoder:
        raise ValueError("attention_backend=sparsekv: encoder-decoder models are not supported")
    if model.get_sliding_window() is not None or _has_sliding_layers(model.hf_text_config):
        raise ValueError("attention_backend=sparsekv: sliding-window layers are not supported")
    if cache.cache_dtype != "auto":
        raise ValueError(
            f"kv_cache_dtype={cache.cache_dtype!r}: must be 'auto' with attention_backend=sparsekv; "
            f"store survivors in fewer bits with sparsekv.key_dtype and sparsekv.value_dtype"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(
            "disable_hybrid_kv_cache_manager=True: must be False with attention_backend=sparsekv, "
            "pages and window are two cache groups"
        )
    if not cache.user_specified_block_size:
        cache.block_size = DEFAULT_BLOCK_SIZE
    layer_format(vllm_config, model.get_head_size()).slots_per_block(cache.block_size)


def _has_sliding_layers(hf_text_config: object) -> bool:
    layer_types = getattr(hf_text_config, "layer_types", None) or ()
    return any("sliding" in layer_type for layer_type in layer_types)
