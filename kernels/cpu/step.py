"""A layer's step as one native call; its structure is filled once, then patched step by step."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_sparsekv.kernels.cpu.calls import (
    AttentionCall,
    Change,
    Feedback,
    StepCall,
    byte_strides,
    encode,
    feedback_of,
    layout_of,
    reach,
    rows_of,
)
from vllm_sparsekv.kernels.cpu.ops import kernel
from vllm_sparsekv.kernels.step.reference import Batch, Layer

PANEL = 32
"""Columns of a matrix that lie together, which ``step/change.h`` streams from memory."""


class _State(NamedTuple):
    """What a layer keeps while its memory stays where it is.

    Attributes:
        memory: addresses of pages and window, and query heads.
        call: all of it but the step.
        attention: the part of ``call`` of that name.
        tensors: that ``call`` points into.
    """

    memory: tuple[int, int | None, int]
    call: StepCall
    attention: AttentionCall
    tensors: list[Tensor]


def step(
    layer: Layer,
    batch: Batch,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    pages: Tensor,
    window: Tensor | None,
    out: Tensor,
    *,
    kept: tuple[Tensor, Tensor] | None = None,
    fills_window: bool = True,
) -> None:
    """As :func:`vllm_sparsekv.kernels.step.reference.step`."""
    memory = (pages.data_ptr(), None if window is None else window.data_ptr(), query.shape[1])
    state: _State | None = layer.state
    if state is None or state.memory != memory:
        state = layer.state = _state(layer, memory, pages, window)
    call, attention = state.call, state.attention
    packed_out = rows_of(out)
    query = rows_of(query)
    attention.query, attention.query_stride = query.data_ptr(), query.stride(0)
    attention.out, attention.out_stride = packed_out.data_ptr(), packed_out.stride(0)
    if key is None:
        attention.key = attention.value = None
    else:
        key, value = rows_of(key), rows_of(value)
        attention.key, attention.key_stride = key.data_ptr(), key.stride(0)
        attention.value, attention.value_stride = value.data_ptr(), value.stride(0)
    call.kept_key, call.kept_value = (x.data_ptr() for x in kept) if kept else (None, None)
    attention.query_start_loc = batch.query_start_loc.data_ptr()
    attention.seq_lens = batch.seq_lens.data_ptr()
    attention.num_reqs = batch.query_start_loc.shape[0] - 1
    attention.block_table = batch.block_table.data_ptr()
    attention.block_table_stride = batch.block_table.stride(0)
    call.slot_mapping, call.num_slots = batch.slot_mapping.data_ptr(), batch.slot_mapping.shape[0]
    if window is not None:
        table = batch.window_block_table
        attention.window_block_table = table.data_ptr()
        attention.window_block_table_stride = table.stride(0)
        attention.blocks_per_ring = table.shape[1]
    if layer.sinks is not None:
        sinks = layer.sinks.float().contiguous()  # weights, which may change in place
        attention.sinks = sinks.data_ptr()
    attention.num_threads = torch.get_num_threads()
    call.fills_window = fills_window and window is not None
    kernel("step")(ctypes.byref(call))
    if packed_out is not out:
        out.copy_(packed_out)


def _state(
    layer: Layer, memory: tuple[int, int | None, int], pages: Tensor, window: Tensor | None
) -> _State:
    fmt, basis = layer.format, layer.basis
    tensors: list[Tensor] = []

    def pointer(x: Tensor | None, dtype: torch.dtype) -> int | None:
        if x is None:
            return None
        tensors.append(x.to(dtype).contiguous())
        return tensors[-1].data_ptr()

    def change(matrix: Tensor | None, mean: Tensor | None = None) -> Change:
        if matrix is None:
            return Change()
        shared = matrix.dim() == 2
        stride = 0 if shared else fmt.head_size**2
        panels = torch.cat([part.flatten(-2) for part in matrix.split(PANEL, -1)], -1)
        return Change(pointer(panels, torch.float16), pointer(mean, torch.float32), stride)

    def feedback(matrix: Tensor | None) -> Feedback:
        if matrix is not None:
            tensors.append(matrix.to(torch.float16).contiguous())
            matrix = tensors[-1]
        return feedback_of(matrix)

    call = StepCall()
    call.key_feedback = feedback(basis.key_feedback)
    call.value_feedback = feedback(basis.value_feedback)
    call.key_change = change(basis.key, basis.key_mean)
    call.query_change = change(basis.query)
    call.value_change = change(basis.value, basis.value_mean)
    attention = call.attention
    attention.out_change = change(basis.output, basis.value_mean)
    attention.pages = memory[0]
    attention.page_stride, attention.page_head_stride = byte_strides(pages)
    attention.slots_per_block = attention.blocks_per_ring = 1
    if window is not None:
        attention.window = memory[1]
        attention.window_stride, attention.window_head_stride = byte_strides(window)
        attention.slots_per_block = window.shape[2]
    attention.num_heads, attention.num_kv_heads = memory[2], pages.shape[1]
    attention.num_blocks, attention.block_size = pages.shape[0], pages.shape[2]
    attention.sliding_window = reach(layer.sliding_window)
    attention.scale, attention.soft_cap = layer.scale, layer.soft_cap or 0.0
    attention.layout = layout_of(encode(fmt))
    return _State(memory, call, attention, tensors)
