"""What ``/metrics`` says of an engine's sparse cache; none of it changes after the start."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import vllm_sparsekv
from vllm_sparsekv.engine.admission import settings_of
from vllm_sparsekv.engine.compat import Metric, VllmConfig, attention_layers, cache_specs
from vllm_sparsekv.engine.layers import sparse_layers
from vllm_sparsekv.engine.skip import dense_token_bytes, sparse_token_bytes
from vllm_sparsekv.engine.window import RingSpec
from vllm_sparsekv.kernels.api import kernel_name

SIZES = ("token", "dense_token", "ring", "request", "dense_request")


def measure(vllm_config: VllmConfig) -> dict[str, Any]:
    """What this rank stores; called in a worker whose cache is planned.

    Returns:
        ``kernels``, their name; and in bytes ``token`` and ``dense_token``, of a token in all
        attention layers; ``ring``, of the windows of a request; ``request`` and ``dense_request``,
        of a request of ``max_model_len`` tokens in all layers, rings and states included.
    """
    sparse = sparse_layers(vllm_config)
    owners = {
        name: layer
        for name, layer in attention_layers(vllm_config).items()
        if not layer.kv_sharing_target_layer_name
    }
    found = dict.fromkeys(SIZES, 0)
    for name, layer in owners.items():
        dense = dense_token_bytes(layer)
        found["dense_token"] += dense
        found["token"] += sparse_token_bytes(layer) if name in sparse else dense
    for stored, plain in cache_specs(vllm_config):
        size = stored.max_memory_usage_bytes(vllm_config)
        found["request"] += size
        if isinstance(stored, RingSpec):
            found["ring"] += size
        else:
            found["dense_request"] += plain.max_memory_usage_bytes(vllm_config)
    return found | {"kernels": kernel_name(vllm_config.device_config.device_type)}


def describe(vllm_config: VllmConfig, ranks: list[dict[str, Any]]) -> list[Metric]:
    """Gauges of an engine that has started.

    Args:
        ranks: what :func:`measure` has found in each worker.
    """
    total = {name: sum(rank[name] for rank in ranks) for name in SIZES}
    metrics = [
        Metric(
            "config_info",
            "Settings in effect, kernels, basis and version.",
            1,
            _labels(vllm_config, sorted({rank["kernels"] for rank in ranks})),
        )
    ]
    if not total["token"]:
        return metrics
    tokens = vllm_config.cache_config.kv_cache_size_tokens
    dense_tokens = tokens * total["request"] // total["dense_request"]
    return metrics + [
        Metric("token_bytes", "Bytes of a token in all attention layers.", total["token"]),
        Metric("dense_token_bytes", "The same of a dense cache.", total["dense_token"]),
        Metric(
            "compression_ratio",
            "Dense bytes of a token over those it takes.",
            total["dense_token"] / total["token"],
        ),
        Metric("ring_bytes", "Bytes of the windows of a request.", total["ring"]),
        Metric("cache_tokens", "Tokens the cache holds, as vLLM reports them.", tokens),
        Metric(
            "dense_cache_tokens",
            "Tokens a dense cache of the same memory holds, by the bytes of a longest request.",
            dense_tokens,
        ),
    ]


def _labels(vllm_config: VllmConfig, kernels: list[str]) -> dict[str, str]:
    settings = asdict(settings_of(vllm_config))
    del settings["calibration_tokens"]
    return {name: str(value) for name, value in settings.items()} | {
        "block_size": str(vllm_config.cache_config.block_size),
        "kernels": ", ".join(kernels),
        "version": vllm_sparsekv.__version__,
    }
