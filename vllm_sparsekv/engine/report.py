"""The start-up lines: what is effective, one for each kind of layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from vllm_sparsekv.engine.admission import drafter_settings, layer_format, logger, settings_of
from vllm_sparsekv.engine.backend import SparseKVBackend
from vllm_sparsekv.engine.compat import VllmConfig, has_drafter, state_pages
from vllm_sparsekv.engine.skip import dense_token_bytes, sparse_token_bytes
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.settings import SparseKVConfig


def log_layers(vllm_config: VllmConfig, *layers: Any) -> None:
    """Log :func:`lines`, from the first worker of a node alone."""
    for line in lines(vllm_config, *layers):
        logger.info_once(line)


def lines(
    vllm_config: VllmConfig,
    sparse: Mapping[str, Any],
    skipped: Mapping[str, Any],
    others: Mapping[str, Any],
    reasons: Collection[str],
) -> list[str]:
    """What the layers of this rank store.

    Args:
        sparse, skipped, others: layers by name, as :func:`vllm_sparsekv.engine.layers.prepare`
            leaves them.
        reasons: why layers of a drafter are not sparse, where it is for what they are.
    """
    block_size = vllm_config.cache_config.block_size
    owners = [layer for layer in sparse.values() if not layer.kv_sharing_target_layer_name]
    kinds = Counter(
        (layer.is_draft_layer, layer.sliding_window, layer.num_kv_heads, layer.impl.cache.format)
        for layer in owners
    )
    result = []
    for (of_drafter, window, heads, fmt), count in kinds.items():
        asked = (drafter_settings if of_drafter else settings_of)(vllm_config)
        result.append(
            f"sparsekv: {count} {_kind(window)}{' of the drafter' if of_drafter else ''}: "
            f"{_vectors(asked, fmt)}; {heads * fmt.token_bytes} bytes per token and layer against "
            f"{heads * fmt.dense_token_bytes} dense "
            f"({fmt.dense_token_bytes / fmt.token_bytes:.2f}x); "
            f"window {fmt.window} tokens{' of int8' if asked.window_dtype == 'int8' else ''} "
            f"({asked.window} asked); block size {block_size}"
        )
    if len(owners) < len(sparse):
        result.append(f"sparsekv: {len(sparse) - len(owners)} layers read the cache of another")
    states = state_pages(vllm_config)
    if states:
        page, state = states[0]
        result.append(
            f"sparsekv: {len(states)} state layers stay vLLM's, in pages of {block_size} tokens of "
            f"ours padded by {page / state - 1:.1%}"
        )
    if skipped:
        result.append(_skipped_line(vllm_config, owners, skipped))
    if vllm_config.kv_transfer_config is not None:
        result.append(_transfer_line(vllm_config, owners, skipped))
    if others:
        backends = {layer.attn_backend.get_name() for layer in others.values()}
        of_drafter = " of the drafter" if has_drafter(vllm_config) else ""
        result.append(
            f"sparsekv: {len(others)} layers{of_drafter} stay dense, on "
            f"{' and '.join(sorted(backends))}{''.join(f'; {why}' for why in sorted(reasons))}"
        )
    return result


def _kind(sliding_window: int | None) -> str:
    if sliding_window is None:
        return "full-attention layers"
    return f"sliding-window layers ({sliding_window} tokens)"


def _vectors(asked: SparseKVConfig, fmt: SparseFormat) -> str:
    return (
        f"keys {asked.key_sparsity:.1%} asked, {fmt.key.sparsity:.1%} effective, "
        f"{asked.key_dtype}; "
        f"values {asked.value_sparsity:.1%} asked, {fmt.value.sparsity:.1%} effective, "
        f"{asked.value_dtype}{'; calibrated' if asked.basis_path else ''}"
    )


def _skipped_line(vllm_config: VllmConfig, sparse: list[Any], skipped: Mapping[str, Any]) -> str:
    """What skipping costs a request of ``max_model_len`` tokens, but for groups left unfilled."""

    def size(layer: Any, backend: Any) -> int:
        spec = backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
        return spec.max_memory_usage_bytes(vllm_config)

    dense = [layer for layer in skipped.values() if not layer.kv_sharing_target_layer_name]
    pages = sum(size(layer, layer.attn_backend) for layer in sparse)
    left = sum(size(layer, layer.attn_backend) for layer in dense)
    instead = sum(
        size(layer, SparseKVBackend.with_format(layer_format(vllm_config, layer.head_size)))
        for layer in dense
    )
    return (
        f"sparsekv: {len(dense)} layers stay dense (skip_layers): a request of "
        f"{vllm_config.model_config.max_model_len} tokens takes about "
        f"{(pages + left) / (pages + instead):.2f}x the cache it takes without them"
    )


def _transfer_line(vllm_config: VllmConfig, sparse: list[Any], skipped: Mapping[str, Any]) -> str:
    """What a token costs wherever pages are kept or moved to."""
    dense = [layer for layer in skipped.values() if not layer.kv_sharing_target_layer_name]
    unskipped = sum(map(dense_token_bytes, dense))
    stored = sum(map(sparse_token_bytes, sparse))
    total, without = unskipped + stored, unskipped + sum(map(dense_token_bytes, sparse))
    return (
        f"sparsekv: {vllm_config.kv_transfer_config.kv_connector} keeps and moves {total} bytes "
        f"per token against {without} dense ({without / total:.2f}x)"
    )
