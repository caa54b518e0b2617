"""The native kernels as torch operators, with the signatures of the references.

``torch.ops.sparsekv.*`` take the format as a list of integers (``encode``), so ``torch.compile``
sees ordinary operators; each fills the structure of its C++ function and calls it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.cpu.build import library, supported_isas
from vllm_sparsekv.kernels.cpu.calls import (
    AttentionCall,
    Change,
    PackCall,
    WindowCall,
    batch_of,
    byte_strides,
    encode,
    feedback_of,
    layout_of,
    reach,
    rows_of,
)

logger = logging.getLogger("vllm.sparsekv.kernels")


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
    if "amx" in available and not torch.cpu._init_amx():
        available.remove("amx")  # the system does not grant the tile registers
    _isa = isa or available[0]
    library()
    _info_once(f"sparsekv: native CPU kernels, {_isa}")


def current_isa() -> str | None:
    """The instruction set kernels run on; None before :func:`use_isa`."""
    return _isa


@cache
def _info_once(message: str) -> None:
    logger.info(message)


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
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    packed_out = rows_of(out)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    ring = (0, 0, 1)
    if window is not None:
        ring = (*byte_strides(window), window.shape[2])
    call = AttentionCall(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        packed_out.data_ptr(),
        pages.data_ptr(),
        None if window is None else window.data_ptr(),
        None if sinks is None else sinks.data_ptr(),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        packed_out.stride(0),
        *byte_strides(pages),
        *ring[:2],
        query.shape[1],
        key.shape[1],
        pages.shape[0],
        pages.shape[2],
        ring[2],
        torch.get_num_threads(),
        reach(sliding_window),
        scale,
        0.0 if soft_cap is None else soft_cap,
        Change(),
        layout_of(tuple(layout)),
        batch_of(
            query_start_loc,
            seq_lens,
            block_table,
            None,
            None if window is None else window_block_table,
        ),
    )
    kernel("attention")(ctypes.byref(call))
    if packed_out is not out:
        out.copy_(packed_out)


def _pack(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    pages: Tensor,
    layout: Sequence[int],
    key_feedback: Tensor | None,
    value_feedback: Tensor | None,
) -> None:
    key, value = rows_of(key), rows_of(value)
    matrices = [
        None if matrix is None else matrix.to(torch.float16).contiguous()
        for matrix in (key_feedback, value_feedback)
    ]
    call = PackCall(
        key.data_ptr(),
        value.data_ptr(),
        pages.data_ptr(),
        slot_mapping.data_ptr(),
        key.stride(0),
        value.stride(0),
        *byte_strides(pages),
        min(key.shape[0], slot_mapping.shape[0]),
        key.shape[1],
        pages.shape[2],
        torch.get_num_threads(),
        layout_of(tuple(layout)),
        *map(feedback_of, matrices),
    )
    kernel("pack")(ctypes.byref(call))


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
    key, value = rows_of(key), rows_of(value)
    call = WindowCall(
        key.data_ptr(),
        value.data_ptr(),
        window.data_ptr(),
        key.stride(0),
        value.stride(0),
        *byte_strides(window),
        key.shape[1],
        window.shape[2],
        torch.get_num_threads(),
        layout_of(tuple(layout)),
        batch_of(query_start_loc, seq_lens, None, slot_mapping, window_block_table),
    )
    kernel("write_window")(ctypes.byref(call))


def kernel(name: str) -> Callable[..., None]:
    """The entry point of that name for the instruction set in use."""
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
    "Tensor key, Tensor value, Tensor slot_mapping, Tensor(a!) pages, int[] layout, "
    "Tensor? key_feedback, Tensor? value_feedback",
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
        encode(fmt),
        out,
        sliding_window,
        soft_cap,
        sinks,
    )


def pack(
    key: Tensor,
    value: Tensor,
    slot_mapping: Tensor,
    pages: Tensor,
    fmt: SparseFormat,
    *,
    key_feedback: Tensor | None = None,
    value_feedback: Tensor | None = None,
) -> None:
    """As :func:`vllm_sparsekv.kernels.pack.reference.pack`, but for sums of feedback."""
    _call_pack(key, value, slot_mapping, pages, encode(fmt), key_feedback, value_feedback)


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
        encode(fmt),
    )
