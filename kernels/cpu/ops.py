"""The native kernels as torch operators, with the signatures of the references.

``torch.ops.sparsekv.*`` take the format as a list of integers (``_encode``), so ``torch.compile``
sees ordinary operators; each fills a C structure of the same name as its C++ mirror and calls it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from vllm_sparsekv.format.layout import SparseFormat, VectorFormat
from vllm_sparsekv.kernels.cpu.build import library, supported_isas

logger = logging.getLogger("vllm.sparsekv.kernels")

STORAGE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    "fp8": 3,
    "int4": 4,
    "int3": 5,
    "int2": 6,
    "int4_int2": 7,
}
"""How elements are stored: the model dtype or a codec's name; mirrored in ``codec.h``."""

MAX_HEAD_SIZE = 1024
MAX_INT32 = 2**31 - 1

_isa: str | None = None


def use_isa(isa: str | None) -> None:
    """Run on this instruction set (``build.ISA_FLAGS``), None for the best one of the machine.

    Raises:
        BuildError: the kernels cannot be built.
        ValueError: this machine does not run it.
    """
    global _isa
    available = supported_isas()
    if isa is not None and isa not in available:
        raise ValueError(f"isa={isa!r}: must be one of {available} on this machine")
    _isa = isa or available[0]
    library()
    _info_once(f"sparsekv: native CPU kernels, {_isa}")


@cache
def _info_once(message: str) -> None:
    logger.info(message)


class VectorLayout(ctypes.Structure):
    _fields_ = [("survivors", ctypes.c_int32), ("storage", ctypes.c_int32)]


class Layout(ctypes.Structure):
    _fields_ = [
        ("head_size", ctypes.c_int32),
        ("storage", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("key", VectorLayout),
        ("value", VectorLayout),
    ]


def _mirror(name: str, fields: list[tuple[type, str]]) -> type[ctypes.Structure]:
    """A structure from groups of same-typed field names, in C++ order."""
    pairs = [(field, ctype) for ctype, names in fields for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


AttentionCall = _mirror(
    "AttentionCall",
    [
        (ctypes.c_void_p, "query key value out pages window"),
        (ctypes.c_void_p, "query_start_loc seq_lens block_table window_block_table sinks"),
        (ctypes.c_int64, "query_stride key_stride value_stride out_stride"),
        (ctypes.c_int64, "page_stride page_head_stride window_stride window_head_stride"),
        (ctypes.c_int64, "block_table_stride window_block_table_stride"),
        (ctypes.c_int32, "num_reqs num_heads num_kv_heads num_blocks block_size"),
        (ctypes.c_int32, "slots_per_block blocks_per_ring num_threads sliding_window"),
        (ctypes.c_float, "scale soft_cap"),
        (Layout, "layout"),
    ],
)
PackCall = _mirror(
    "PackCall",
    [
        (ctypes.c_void_p, "key value pages slot_mapping"),
        (ctypes.c_int64, "key_stride value_stride page_stride page_head_stride num_tokens"),
        (ctypes.c_int32, "num_kv_heads block_size num_threads"),
        (Layout, "layout"),
    ],
)
WindowCall = _mirror(
    "WindowCall",
    [
        (ctypes.c_void_p, "key value window query_start_loc seq_lens window_block_table"),
        (ctypes.c_void_p, "slot_mapping"),
        (ctypes.c_int64, "key_stride value_stride window_stride window_head_stride"),
        (ctypes.c_int64, "window_block_table_stride num_slots"),
        (ctypes.c_int32, "num_reqs num_kv_heads slots_per_block blocks_per_ring num_threads"),
        (Layout, "layout"),
    ],
)


@cache
def _encode(fmt: SparseFormat) -> tuple[int, ...]:
    """The format as an operator argument: the integers of ``Layout``, in order."""
    return (
        fmt.head_size,
        STORAGE[fmt.dtype],
        fmt.window,
        fmt.key.survivors,
        _storage(fmt.key),
        fmt.value.survivors,
        _storage(fmt.value),
    )


def _storage(vector: VectorFormat) -> int:
    name = vector.codec.name
    return STORAGE[vector.codec.dtype if name == "auto" else name]


@cache
def _layout(encoded: tuple[int, ...]) -> Layout:
    return Layout(*encoded[:3], VectorLayout(*encoded[3:5]), VectorLayout(*encoded[5:]))


def _rows(x: Tensor) -> Tensor:
    """(num_tokens, heads, D) with the heads of a token contiguous; any stride between tokens."""
    packed = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if packed else x.contiguous()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    window: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    window_block_table: Tensor | None,
    scale: float,
    layout: Sequence[int],
    out: Tensor,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> None:
    query, key, value = _rows(query), _rows(key), _rows(value)
    packed_out = _rows(out)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    ring = (0, 0, 1, 1)
    if window is not None:
        ring = (*_byte_strides(window), window.shape[2], window_block_table.shape[1])
    call = AttentionCall(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        packed_out.data_ptr(),
        pages.data_ptr(),
        None if window is None else window.data_ptr(),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        block_table.data_ptr(),
        None if window is None else window_block_table.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        packed_out.stride(0),
        *_byte_strides(pages),
        *ring[:2],
        block_table.stride(0),
        0 if window is None else window_block_table.stride(0),
        query_start_loc.shape[0] - 1,
        query.shape[1],
        key.shape[1],
        pages.shape[0],
        pages.shape[2],
        *ring[2:],
        torch.get_num_threads(),
        0 if sliding_window is None else min(sliding_window, MAX_INT32),
        scale,
        0.0 if soft_cap is None else soft_cap,
        _layout(tuple(layout)),
    )
    _kernel("attention")(ctypes.byref(call))
    if packed_out is not out:
        out.copy_(packed_out)


def _pack(
    key: Tensor, value: Tensor, slot_mapping: Tensor, pages: Tensor, layout: Sequence[int]
) -> None:
    key, value = _rows(key), _rows(value)
    call = PackCall(
        key.data_ptr(),
        value.data_ptr(),
        pages.data_ptr(),
        slot_mapping.data_ptr(),
        key.stride(0),
        value.stride(0),
        *_byte_strides(pages),
        min(key.shape[0], slot_mapping.shape[0]),
        key.shape[1],
        pages.shape[2],
        torch.get_num_threads(),
        _layout(tuple(layout)),
    )
    _kernel("pack")(ctypes.byref(call))


def _write_window(
    key: Tensor,
    value: Tensor,
    window: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    window_block_table: Tensor,
    layout: Sequence[int],
) -> None:
    key, value = _rows(key), _rows(value)
    call = WindowCall(
        key.data_ptr(),
        value.data_ptr(),
        window.data_ptr(),
        query_start_loc.data_ptr(),
        seq_lens.data_ptr(),
        window_block_table.data_ptr(),
        slot_mapping.data_ptr(),
        key.stride(0),
        value.stride(0),
        *_byte_strides(window),
        window_block_table.stride(0),
        slot_mapping.shape[0],
        query_start_loc.shape[0] - 1,
        key.shape[1],
        window.shape[2],
        window_block_table.shape[1],
        torch.get_num_threads(),
        _layout(tuple(layout)),
    )
    _kernel("write_window")(ctypes.byref(call))


def _byte_strides(blocks: Tensor) -> tuple[int, int]:
    """Bytes from block to block and from KV head to KV head."""
    size = blocks.element_size()
    return blocks.stride(0) * size, blocks.stride(1) * size


def _kernel(name: str) -> Callable[..., None]:
    if _isa is None:
        use_isa(None)
    return getattr(library(), f"sparsekv_{name}_{_isa}")


_operators = torch.library.Library("sparsekv", "DEF")


def _operator(
    name: str, arguments: str, implementation: Callable[..., None]
) -> Callable[..., None]:
    """Register with torch and return what to call.

    Eager code calls the implementation itself: the dispatcher would double the cost of a call.
    """
    _operators.define(f"{name}({arguments}) -> ()")
    _operators.impl(name, implementation, "CPU")
    torch.library.register_fake(f"sparsekv::{name}", lambda *args: None)
    operator = getattr(torch.ops.sparsekv, name).default

    def call(*args: object) -> None:
        (operator if torch.compiler.is_compiling() else implementation)(*args)

    return call


_call_attention = _operator(
    "sparse_attention",
    "Tensor query, Tensor key, Tensor value, Tensor pages, Tensor? window, "
    "Tensor query_start_loc, Tensor seq_lens, Tensor block_table, Tensor? window_block_table, "
    "float scale, int[] layout, Tensor(a!) out, "
    "int? sliding_window, float? soft_cap, Tensor? sinks",
    _attention,
)
_call_pack = _operator(
    "pack",
    "Tensor key, Tensor value, Tensor slot_mapping, Tensor(a!) pages, int[] layout",
    _pack,
)
_call_write_window = _operator(
    "write_window",
    "Tensor key, Tensor value, Tensor(a!) window, Tensor query_start_loc, Tensor seq_lens, "
    "Tensor slot_mapping, Tensor window_block_table, int[] layout",
    _write_window,
)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    window: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    window_block_table: Tensor | None,
    scale: float,
    fmt: SparseFormat,
    out: Tensor,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.attention.reference.sparse_attention`."""
    _call_attention(
        query,
        key,
        value,
        pages,
        window,
        query_start_loc,
        seq_lens,
        block_table,
        window_block_table,
        scale,
        _encode(fmt),
        out,
        sliding_window,
        soft_cap,
        sinks,
    )


def pack(
    key: Tensor, value: Tensor, slot_mapping: Tensor, pages: Tensor, fmt: SparseFormat
) -> None:
    """As :func:`vllm_sparsekv.kernels.pack.reference.pack`."""
    _call_pack(key, value, slot_mapping, pages, _encode(fmt))


def write_window(
    key: Tensor,
    value: Tensor,
    window: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    window_block_table: Tensor,
    fmt: SparseFormat,
) -> None:
    """As :func:`vllm_sparsekv.kernels.window.reference.write_window`."""
    _call_write_window(
        key,
        value,
        window,
        query_start_loc,
        seq_lens,
        slot_mapping,
        window_block_table,
        _encode(fmt),
    )
