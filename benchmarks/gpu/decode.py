"""Our side of the kernel benchmark: a decode step over sparse pages, and packing a prompt chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timing import measure

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention import reference
from vllm_sparsekv.kernels.attention.launch import (
    Launch,
    max_workspace_elements,
    tile_and_warps,
)
from vllm_sparsekv.kernels.attention.triton import sparse_attention
from vllm_sparsekv.kernels.pack.triton import pack
from vllm_sparsekv.kernels.window.triton import write_window
from vllm_sparsekv.settings import SparseKVConfig

CACHES = {
    "auto-50-50": SparseKVConfig(0.5, 0.5, "auto", "auto", 64, "auto"),
    "fp8-50-50": SparseKVConfig(0.5, 0.5, "fp8", "fp8", 64, "auto"),
    "int4-30-50": SparseKVConfig(0.3, 0.5, "int4", "int4", 64, "auto"),
    "int4-50-50": SparseKVConfig(0.5, 0.5, "int4", "int4", 64, "auto"),
    "int4-0-50": SparseKVConfig(0.0, 0.5, "int4", "int4", 64, "auto"),
    "int4-0-0": SparseKVConfig(0.0, 0.0, "int4", "int4", 112, "int8"),
    "int4-int3-0-0": SparseKVConfig(0.0, 0.0, "int4", "int3", 112, "int8"),
    "int3-0-0": SparseKVConfig(0.0, 0.0, "int3", "int3", 112, "int8"),
    "int4_int2-int3-0-0": SparseKVConfig(0.0, 0.0, "int4_int2", "int3", 112, "int8", basis="any"),
    "int3-int2-0-0": SparseKVConfig(0.0, 0.0, "int3", "int2", 112, "int8"),
}
"""Codecs, then sparsity of keys and of values in percent; kernels read no basis."""
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A model's attention; Llama-3.1-8B's by default."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 64


class Decode:
    """One decode step of a batch whose pages hold packed random vectors, no two pages shared."""

    def __init__(
        self, shape: Shape, fmt: SparseFormat, batch: int, context: int, device: torch.device
    ) -> None:
        self.fmt, self.context = fmt, context
        size, heads = shape.block_size, shape.kv_heads
        self.slots = fmt.slots_per_block(size)
        ring_blocks = fmt.blocks_per_ring(self.slots)
        blocks = -(-(context + 1) // size)
        self.query = torch.randn(batch, shape.heads, fmt.head_size, dtype=DTYPE, device=device)
        self.key = torch.randn(batch, heads, fmt.head_size, dtype=DTYPE, device=device)
        self.value = torch.randn_like(self.key)
        self.pages = self._pages(1 + batch * blocks, shape, device)
        rings = (1 + batch * ring_blocks, heads, self.slots, fmt.slot_elements)
        self.window = torch.zeros(rings, dtype=fmt.window_dtype, device=device)
        order = torch.randperm(batch * blocks, device=device).int() + 1
        self.block_table = order.view(batch, blocks)
        ring = torch.arange(1, 1 + batch * ring_blocks, device=device, dtype=torch.int32)
        self.window_block_table = ring.view(batch, ring_blocks)
        self.query_start_loc = torch.arange(batch + 1, device=device, dtype=torch.int32)
        self.seq_lens = torch.full((batch,), context + 1, device=device, dtype=torch.int32)
        self._fill_window(batch, heads, device)
        self.out = torch.empty_like(self.query)
        group = shape.heads // heads
        scratch = max_workspace_elements(device, group, fmt.head_size)
        self.workspace = torch.empty(scratch, dtype=torch.float32, device=device)

    def _pages(self, count: int, shape: Shape, device: torch.device) -> torch.Tensor:
        size, heads = shape.block_size, shape.kv_heads
        width = self.fmt.token_bytes
        pages = torch.empty(count, heads, size, width, dtype=torch.uint8, device=device)
        distinct = min(count, 64 if device.type == "cuda" else 2)
        tokens = distinct * size
        vectors = torch.randn(2, tokens, heads, self.fmt.head_size, dtype=DTYPE, device=device)
        pack(*vectors, torch.arange(tokens, device=device), pages, self.fmt)
        for start in range(distinct, count, distinct):
            end = min(start + distinct, count)
            pages[start:end] = pages[: end - start]
        return pages

    def _fill_window(self, batch: int, heads: int, device: torch.device) -> None:
        held = min(self.fmt.window, self.context)
        size = (2, batch * held, heads, self.fmt.head_size)
        write_window(
            *torch.randn(size, dtype=DTYPE, device=device),
            self.window,
            self.query_start_loc * held,
            self.seq_lens - 1,
            torch.zeros(batch * held, dtype=torch.int64, device=device),
            self.window_block_table,
            self.fmt,
        )

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.value,
            self.pages,
            self.window,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.window_block_table,
            self.fmt.head_size**-0.5,
            self.fmt,
            self.out,
        )

    def attend(self) -> None:
        sparse_attention(*self.arguments(), workspace=self.workspace)

    def bytes_read(self) -> int:
        """Pages and window slots of one step."""
        batch, heads, _ = self.key.shape
        held = min(self.fmt.window, self.context)
        tokens = (self.context - held) * self.fmt.token_bytes + held * self.fmt.slot_bytes
        return batch * heads * tokens

    def check(self) -> float:
        """Relative error against the torch reference; nothing is timed unless it is small."""
        self.attend()
        actual = self.out.float()
        reference.sparse_attention(*self.arguments())
        error = ((actual - self.out.float()).norm() / self.out.float().norm()).item()
        if not error < 1e-2:
            raise RuntimeError(f"relative error {error}: the kernel is wrong on this device")
        return error


def measure_pack(
    shape: Shape, fmt: SparseFormat, tokens: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Pruning and packing one prompt chunk of one layer."""
    size = (2, tokens, shape.kv_heads, shape.head_size)
    key, value = torch.randn(size, dtype=DTYPE, device=device)
    blocks = -(-tokens // shape.block_size)
    tile = (blocks, shape.kv_heads, shape.block_size, fmt.token_bytes)
    pages = torch.empty(tile, dtype=torch.uint8, device=device)
    slots = torch.arange(tokens, device=device)
    times = measure(lambda: pack(key, value, slots, pages, fmt), device, repeats)
    return {"tokens": tokens, "times": times}


def instructions_per_element(device: torch.device) -> dict[str, str] | None:
    """Counted in the machine code for this device; None in a dry run."""
    if device.type != "cuda":
        return None
    import sass

    major, minor = torch.cuda.get_device_capability(device)
    tile, num_warps = tile_and_warps(8, 128)
    launch = Launch(8, tile, 8, num_warps)
    return {
        name: str(
            sass.attention_report(
                SparseFormat.from_config(config, 128, DTYPE), 10 * major + minor, launch
            )
        )
        for name, config in CACHES.items()
    }
