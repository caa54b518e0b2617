"""vLLM's own decode kernels over paged caches, where vLLM is installed.

``vllm-flash`` and ``vllm-triton`` read bf16, ``vllm-triton-fp8`` a cache of float8 e4m3,
``vllm-turboquant-*`` TurboQuant's. Contents are random; only the time matters.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from decode import DTYPE, Shape

BLOCK_SIZE = 16
TURBOQUANT = ("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc")
SEGMENTS = 16
"""What vLLM splits a history into for its Triton kernel, up to a batch of 128 / KV heads."""

Steps = dict[str, Callable[[], Any]]


def vllm_steps(shape: Shape, batch: int, context: int, device: torch.device) -> Steps:
    """By name; empty without vLLM. What a kernel lacks on this machine it says when called."""
    if device.type != "cuda" or find_spec("vllm") is None:
        return {}
    rival = _Paged(shape, batch, context, device)
    steps: Steps = {
        "vllm-flash": rival.flash,
        "vllm-triton": rival.triton(DTYPE),
        "vllm-triton-fp8": rival.triton(torch.float8_e4m3fn),
    }
    for name in TURBOQUANT:
        steps["vllm-" + name.replace("_", "-")] = rival.turboquant(name)
    return steps


class _Paged:
    """A batch of single queries over a paged cache (num_blocks, block size, KV heads, D)."""

    def __init__(self, shape: Shape, batch: int, context: int, device: torch.device) -> None:
        self.shape, self.batch, self.length, self.device = shape, batch, context + 1, device
        self.query = torch.randn(batch, shape.heads, shape.head_size, dtype=DTYPE, device=device)
        self.out = torch.empty_like(self.query)
        blocks = -(-self.length // BLOCK_SIZE)
        order = torch.randperm(batch * blocks, device=device).int()
        self.block_table = order.view(batch, blocks)
        self.cache_shape = (batch * blocks, BLOCK_SIZE, shape.kv_heads)
        self.starts = torch.arange(batch + 1, device=device, dtype=torch.int32)
        self.lengths = torch.full((batch,), self.length, device=device, dtype=torch.int32)

    def _caches(self, dtype: torch.dtype) -> list[torch.Tensor]:
        size = (*self.cache_shape, self.shape.head_size)
        return [torch.randn(size, dtype=DTYPE, device=self.device).to(dtype) for _ in range(2)]

    def flash(self) -> None:
        from vllm.v1.attention.backends.fa_utils import (
            flash_attn_varlen_func,
            get_flash_attn_version,
        )

        if not hasattr(self, "flash_caches"):
            self.flash_caches = self._caches(DTYPE)
        flash_attn_varlen_func(
            q=self.query,
            k=self.flash_caches[0],
            v=self.flash_caches[1],
            out=self.out,
            cu_seqlens_q=self.starts,
            max_seqlen_q=1,
            seqused_k=self.lengths,
            max_seqlen_k=self.length,
            softmax_scale=self.shape.head_size**-0.5,
            causal=True,
            block_table=self.block_table,
            fa_version=get_flash_attn_version(),
        )

    def triton_arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Keyword arguments of vLLM's ``unified_attention``."""
        heads, size = self.shape.heads, self.shape.head_size
        key, value = self._caches(dtype)
        ones = torch.ones(self.batch, self.shape.kv_heads, device=self.device)
        partial = torch.empty(self.batch, heads, SEGMENTS, size, device=self.device)
        return {
            "q": self.query,
            "k": key,
            "v": value,
            "out": self.out,
            "cu_seqlens_q": self.starts,
            "max_seqlen_q": 1,
            "seqused_k": self.lengths,
            "max_seqlen_k": self.length,
            "softmax_scale": size**-0.5,
            "causal": True,
            "window_size": (-1, -1),
            "block_table": self.block_table,
            "softcap": 0,
            "q_descale": None,
            "k_descale": ones,
            "v_descale": ones,
            "seq_threshold_3D": 128 // self.shape.kv_heads,
            "num_par_softmax_segments": SEGMENTS,
            "softmax_segm_output": partial,
            "softmax_segm_max": torch.empty_like(partial[..., 0]),
            "softmax_segm_expsum": torch.empty_like(partial[..., 0]),
        }

    def triton(self, dtype: torch.dtype) -> Callable[[], Any]:
        arguments: dict[str, Any] = {}

        def step() -> None:
            from vllm.v1.attention.ops.triton_unified_attention import unified_attention

            if not arguments:
                arguments.update(self.triton_arguments(dtype))
            unified_attention(**arguments)

        return step

    def turboquant_arguments(self, name: str) -> dict[str, Any]:
        """Keyword arguments of vLLM's ``triton_turboquant_decode_attention``."""
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        size = self.shape.head_size
        config = TurboQuantConfig.from_cache_dtype(name, size)
        slots = (*self.cache_shape, config.slot_size_aligned)
        rotation = torch.eye(size, device=self.device)
        return {
            "query": self.query,
            "kv_cache": torch.randint(0, 120, slots, dtype=torch.uint8, device=self.device),
            "block_table": self.block_table,
            "seq_lens": self.lengths,
            "Pi": rotation,
            "centroids": get_centroids(size, config.centroid_bits).to(self.device).float(),
            "scale": size**-0.5,
            "mse_bits": config.key_mse_bits,
            "key_packed_size": config.key_packed_size,
            "value_quant_bits": config.effective_value_quant_bits,
            "key_fp8": config.key_fp8,
            "norm_correction": config.norm_correction,
            "PiT": rotation,
        }

    def turboquant(self, name: str) -> Callable[[], Any]:
        arguments: dict[str, Any] = {}

        def step() -> None:
            from vllm.v1.attention.ops.triton_turboquant_decode import (
                triton_turboquant_decode_attention,
            )

            if not arguments:
                arguments.update(self.turboquant_arguments(name))
            triton_turboquant_decode_attention(**arguments)

        return step
