"""The C structures of the native kernels' arguments, mirrors of those of the same names in C++."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import Tensor, bfloat16, float16, float32

from vllm_sparsekv.format.feedback import block_length
from vllm_sparsekv.format.layout import SparseFormat, VectorFormat

STORAGE = {
    float32: 0,
    bfloat16: 1,
    float16: 2,
    "fp8": 3,
    "int4": 4,
    "int3": 5,
    "int2": 6,
    "int4_int2": 7,
}
"""How elements are stored: the model dtype or a codec's name; mirrored in ``codec.h``."""


class VectorLayout(ctypes.Structure):
    _fields_ = [("survivors", ctypes.c_int32), ("storage", ctypes.c_int32)]


class Layout(ctypes.Structure):
    _fields_ = [
        ("head_size", ctypes.c_int32),
        ("storage", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("window_bytes", ctypes.c_int32),
        ("key", VectorLayout),
        ("value", VectorLayout),
    ]


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """Fields of a structure from groups of same-typed names, in C++ order."""
    return [(field, ctype) for ctype, names in groups for field in names.split()]


class Change(ctypes.Structure):
    _fields_ = _fields((ctypes.c_void_p, "matrix mean"), (ctypes.c_int64, "matrix_stride"))


class Feedback(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "matrix"), (ctypes.c_int64, "stride"), (ctypes.c_int32, "length")
    )


class StepBatch(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "query_start_loc seq_lens block_table window_block_table slot_mapping"),
        (ctypes.c_int64, "block_table_stride window_block_table_stride num_slots"),
        (ctypes.c_int32, "num_reqs blocks_per_ring"),
    )


class AttentionCall(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "query key value out pages window"),
        (ctypes.c_void_p, "sinks"),
        (ctypes.c_int64, "query_stride key_stride value_stride out_stride"),
        (ctypes.c_int64, "page_stride page_head_stride window_stride window_head_stride"),
        (ctypes.c_int32, "num_heads num_kv_heads num_blocks block_size slots_per_block"),
        (ctypes.c_int32, "num_threads sliding_window"),
        (ctypes.c_float, "scale soft_cap"),
        (Change, "out_change"),
        (Layout, "layout"),
        (StepBatch, "batch"),
    )


class PackCall(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "key value pages slot_mapping"),
        (ctypes.c_int64, "key_stride value_stride page_stride page_head_stride num_tokens"),
        (ctypes.c_int32, "num_kv_heads block_size num_threads"),
        (Layout, "layout"),
        (Feedback, "key_feedback value_feedback"),
    )


class WindowCall(ctypes.Structure):
    _fields_ = _fields(
        (ctypes.c_void_p, "key value window"),
        (ctypes.c_int64, "key_stride value_stride window_stride window_head_stride"),
        (ctypes.c_int32, "num_kv_heads slots_per_block num_threads"),
        (Layout, "layout"),
        (StepBatch, "batch"),
    )


class StepCall(ctypes.Structure):
    _fields_ = _fields(
        (AttentionCall, "attention"),
        (Change, "key_change query_change value_change"),
        (Feedback, "key_feedback value_feedback"),
        (ctypes.c_void_p, "batch kept_key kept_value"),
        (ctypes.c_int32, "fills_window"),
    )


@cache
def encode(fmt: SparseFormat) -> tuple[int, ...]:
    """The format as an operator argument: the integers of ``Layout``, in order."""
    return (
        fmt.head_size,
        STORAGE[fmt.dtype],
        fmt.window,
        fmt.window_dtype.itemsize,
        fmt.key.survivors,
        _storage(fmt.key),
        fmt.value.survivors,
        _storage(fmt.value),
    )


def _storage(vector: VectorFormat) -> int:
    name = vector.codec.name
    return STORAGE[vector.codec.dtype if name == "auto" else name]


@cache
def layout_of(encoded: tuple[int, ...]) -> Layout:
    return Layout(*encoded[:4], VectorLayout(*encoded[4:6]), VectorLayout(*encoded[6:]))


def feedback_of(matrix: Tensor | None) -> Feedback:
    """Of a contiguous (num_kv_heads, D, D) float16, which must outlive the call."""
    if matrix is None:
        return Feedback()
    return Feedback(matrix.data_ptr(), matrix.stride(0), block_length(matrix.shape[-1]))


def batch_of(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor | None,
    slot_mapping: Tensor | None,
    window_block_table: Tensor | None,
) -> StepBatch:
    """Of tensors that must outlive the call; None where it is not read."""
    batch = StepBatch(query_start_loc.data_ptr(), seq_lens.data_ptr())
    batch.num_reqs, batch.blocks_per_ring = query_start_loc.shape[0] - 1, 1
    if block_table is not None:
        batch.block_table, batch.block_table_stride = block_table.data_ptr(), block_table.stride(0)
    if slot_mapping is not None:
        batch.slot_mapping, batch.num_slots = slot_mapping.data_ptr(), slot_mapping.shape[0]
    if window_block_table is not None:
        batch.window_block_table = window_block_table.data_ptr()
        batch.window_block_table_stride = window_block_table.stride(0)
        batch.blocks_per_ring = window_block_table.shape[1]
    return batch


def rows_of(x: Tensor) -> Tensor:
    """(num_tokens, heads, D) with the heads of a token contiguous; any stride between tokens."""
    packed = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if packed else x.contiguous()


def byte_strides(blocks: Tensor) -> tuple[int, int]:
    """Bytes from block to block and from KV head to KV head."""
    size = blocks.element_size()
    return blocks.stride(0) * size, blocks.stride(1) * size


def reach(sliding_window: int | None) -> int:
    """Positions that a query sees at most, as an int32; 0 for all."""
    return min(sliding_window or 0, 2**31 - 1)
