"""Decode attention over dense bf16 caches: torch's own backends and, where installed, others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from decode import DTYPE, Shape
from torch.nn.attention import SDPBackend, sdpa_kernel

Steps = dict[str, Callable[[], Any]]


def dense_steps(shape: Shape, batch: int, context: int, device: torch.device) -> Steps:
    """By name; the cache is contiguous, which is the best case for all of them."""
    size = (batch, shape.kv_heads, context + 1, shape.head_size)
    query = torch.randn(batch, shape.heads, 1, shape.head_size, dtype=DTYPE, device=device)
    key = torch.randn(size, dtype=DTYPE, device=device)
    value = torch.randn(size, dtype=DTYPE, device=device)

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def step() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, enable_gqa=True
                )

        return step

    if device.type != "cuda":
        return {"sdpa-math": sdpa(SDPBackend.MATH)}
    steps = {
        "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return steps
    cache = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    return steps | {"flash-attn": lambda: flash_attn_with_kvcache(*cache)}


def fits(shape: Shape, batch: int, context: int, device: torch.device) -> bool:
    """Whether the dense cache, by far the largest thing here, takes less than a quarter."""
    if device.type != "cuda":
        return True
    dense = 2 * batch * context * shape.kv_heads * shape.head_size * DTYPE.itemsize
    return 4 * dense < torch.cuda.get_device_properties(device).total_memory
