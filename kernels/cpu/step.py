"""A layer's step as one native call; its structure is filled once, then patched step by step."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparsekv.kernels.cpu.calls import (
    AttentionCall,
    Change,
    Feedback,
    StepCall,
    batch_of,
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


@dataclass
class _State:
    """What a layer keeps while its memory stays where it is.

    Attributes:
        memory: addresses of pages and window.
        call: all of it but the step.
        attention: the part of ``call`` of that name.
        tensors: that ``call`` points into.
        strides: of query, output, key and value, where ``call`` has them as they came.
    """

    memory: tuple[int, int | None]
    call: StepCall
    attention: AttentionCall
    tensors: list[Tensor]
    strides: tuple = ()


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
    memory = (pages.data_ptr(), None if window is None else window.data_ptr())
    state: _State | None = layer.state
    if state is None or state.memory != memory:
        state = layer.state = _state(layer, memory, pages, window)
    call, attention = state.call, state.attention
    given, vectors = out, [query, out] if key is None else [query, out, key, value]
    strides = tuple(x.stride() for x in vectors)
    if strides != state.strides:
        query, out, *written = vectors = [rows_of(x) for x in vectors]
        attention.num_heads = query.shape[1]
        attention.query_stride, attention.out_stride = query.stride(0), out.stride(0)
        if written:
            attention.key_stride, attention.value_stride = (x.stride(0) for x in written)
        state.strides = strides if strides == tuple(x.stride() for x in vectors) else ()
    attention.query, attention.out = query.data_ptr(), out.data_ptr()
    if key is None:
        attention.key = attention.value = None
    else:
        attention.key, attention.value = vectors[2].data_ptr(), vectors[3].data_ptr()
    if batch.state is None:
        tensors = (batch.query_start_loc, batch.seq_lens, batch.block_table, batch.slot_mapping)
        batch.state = batch_of(*tensors, batch.window_block_table)
    call.batch = ctypes.addressof(batch.state)
    call.kept_key, call.kept_value = (x.data_ptr() for x in kept) if kept else (None, None)
    if layer.sinks is not None:
        sinks = layer.sinks.float().contiguous()  # weights, which may change in place
        attention.sinks = sinks.data_ptr()
    attention.num_threads = torch.get_num_threads()
    call.fills_window = fills_window and window is not None
    kernel("step")(ctypes.byref(call))
    if out is not given:
        given.copy_(out)


def _state(
    layer: Layer, memory: tuple[int, int | None], pages: Tensor, window: Tensor | None
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
    attention.slots_per_block = 1
    if window is not None:
        attention.window = memory[1]
        attention.window_stride, attention.window_head_stride = byte_strides(window)
        attention.slots_per_block = window.shape[2]
    attention.num_blocks, attention.num_kv_heads, attention.block_size = pages.shape[:3]
    attention.sliding_window = reach(layer.sliding_window)
    attention.scale, attention.soft_cap = layer.scale, layer.soft_cap or 0.0
    attention.layout = layout_of(encode(fmt))
    return _State(memory, call, attention, tensors)
