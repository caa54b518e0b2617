"""The operations on sparse pages, as the attention backend calls them.

Arguments are checked here, then the implementation for the tensors' device runs: native kernels on
CPUs (compiled on first use), Triton on CUDA, the torch reference on anything else. A CPU without a
compiler gets the reference too, with a warning. The environment variable ``SPARSEKV_KERNELS``
forces ``reference``, or ``native``, which then raises where there is none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch

from vllm_sparsekv.format.layout import SparseFormat, VectorFormat
from vllm_sparsekv.kernels.attention import reference as attention_reference
from vllm_sparsekv.kernels.cpu.build import BuildError
from vllm_sparsekv.kernels.pack import reference as pack_reference
from vllm_sparsekv.kernels.step import reference as step_reference
from vllm_sparsekv.kernels.step.reference import Batch, Layer, Operations, form_of
from vllm_sparsekv.kernels.window import reference as window_reference

__all__ = [
    "Batch",
    "Layer",
    "check_environment",
    "pack",
    "sparse_attention",
    "step",
    "workspace_elements",
    "write_window",
]

logger = logging.getLogger("vllm.sparsekv.kernels")

ENVIRONMENT_VARIABLE = "SPARSEKV_KERNELS"
CHOICES = ("reference", "native")


class Implementation(NamedTuple):
    """The operations; signatures and semantics are those of each ``reference.py``."""

    pack: Callable[..., None]
    sparse_attention: Callable[..., None]
    write_window: Callable[..., None]
    step: Callable[..., None]

    @classmethod
    def composed(cls, operations: Operations) -> Implementation:
        """One whose steps are made of its other operations."""
        return cls(*operations, partial(step_reference.step, operations))


REFERENCE = Implementation.composed(
    Operations(
        pack_reference.pack, attention_reference.sparse_attention, window_reference.write_window
    )
)


def check_environment() -> str | None:
    """What ``SPARSEKV_KERNELS`` forces.

    Raises:
        ValueError: not one of ``CHOICES``.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen and chosen not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={chosen!r}: must be one of {list(CHOICES)}")
    return chosen


@cache
def implementation(device_type: str) -> Implementation:
    """What serves tensors on this kind of device; says so once in the log.

    Raises:
        BuildError: ``SPARSEKV_KERNELS=native`` and the CPU kernels cannot be built.
        ValueError: ``SPARSEKV_KERNELS`` is not one of ``CHOICES``, or is ``native`` on a device
            without native kernels.
    """
    chosen = check_environment()
    if chosen != "reference":
        if device_type == "cuda":
            return _triton()
        if device_type == "cpu":
            try:
                return _native_cpu()
            except BuildError as error:
                if chosen == "native":
                    raise
                logger.warning("sparsekv: no native CPU kernels, it will be slow: %s", error)
        elif chosen == "native":
            raise ValueError(f"{ENVIRONMENT_VARIABLE}='native': no native kernels on {device_type}")
    logger.info("sparsekv: torch reference kernels on %s", device_type)
    return REFERENCE


def kernel_name(device_type: str) -> str:
    """What :func:`implementation` runs: "reference", "triton" or "native" and instruction set."""
    if implementation(device_type) is REFERENCE:
        return "reference"
    if device_type == "cuda":
        return "triton"
    from vllm_sparsekv.kernels.cpu import ops

    return f"native {ops.current_isa()}"


def _native_cpu() -> Implementation:
    from vllm_sparsekv.kernels.cpu import ops
    from vllm_sparsekv.kernels.cpu.step import step

    ops.use_isa(None)
    return Implementation(ops.pack, ops.sparse_attention, ops.write_window, step)


def _triton() -> Implementation:
    from vllm_sparsekv.kernels.attention.triton import sparse_attention
    from vllm_sparsekv.kernels.pack.triton import pack
    from vllm_sparsekv.kernels.step.triton import step
    from vllm_sparsekv.kernels.window.triton import write_window

    logger.info("sparsekv: Triton kernels")
    return Implementation(pack, sparse_attention, write_window, step)


def pack(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    fmt: SparseFormat,
    *,
    key_feedback: torch.Tensor | None = None,
    value_feedback: torch.Tensor | None = None,
) -> None:
    """Prune a step's keys and values into their pages: see ``pack/reference.py``.

    Raises:
        ValueError: a shape or dtype does not fit the format; names the argument.
    """
    _check_vectors(fmt, key=key, value=value)
    _check_pages(pages, key.shape[1], fmt)
    _check_indices(1, torch.int64, slot_mapping=slot_mapping)
    _check_feedback("key_feedback", key_feedback, fmt.key, key.shape[1])
    _check_feedback("value_feedback", value_feedback, fmt.value, key.shape[1])
    implementation(pages.device.type).pack(
        key,
        value,
        slot_mapping,
        pages,
        fmt,
        key_feedback=key_feedback,
        value_feedback=value_feedback,
    )


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor | None,
    scale: float,
    fmt: SparseFormat,
    out: torch.Tensor,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Causal attention of a ragged batch into ``out``: see ``attention/reference.py``.

    Args:
        workspace: scratch of :func:`workspace_elements`, for the implementations that take any.

    Raises:
        ValueError: a shape or dtype does not fit the format; names the argument.
    """
    _check_queries(query, key, value, out, fmt, sliding_window, soft_cap, sinks)
    _check_batch(
        key, pages, window, query_start_loc, seq_lens, block_table, window_block_table, fmt
    )
    if not fmt.window:
        window = window_block_table = None
    scratch = {} if workspace is None else {"workspace": workspace}
    implementation(pages.device.type).sparse_attention(
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
        fmt,
        out,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
        **scratch,
    )


def workspace_elements(device: torch.device, group: int, head_size: int) -> int:
    """Float32 elements of scratch that attention on the device takes at most; 0 for none.

    Args:
        group: query heads that share a KV head.
    """
    if device.type != "cuda" or implementation(device.type) is REFERENCE:
        return 0
    from vllm_sparsekv.kernels.attention.launch import max_workspace_elements

    return max_workspace_elements(device, group, head_size)


def write_window(
    key: torch.Tensor,
    value: torch.Tensor,
    window: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot_mapping: torch.Tensor,
    window_block_table: torch.Tensor,
    fmt: SparseFormat,
) -> None:
    """Copy a step's newest tokens into the ring: see ``window/reference.py``.

    Raises:
        ValueError: a shape or dtype does not fit the format; names the argument.
    """
    _check_vectors(fmt, key=key, value=value)
    _check_window(window, window_block_table, key.shape[1], fmt)
    _check_indices(1, torch.int32, query_start_loc=query_start_loc, seq_lens=seq_lens)
    _check_indices(1, torch.int64, slot_mapping=slot_mapping)
    implementation(window.device.type).write_window(
        key, value, window, query_start_loc, seq_lens, slot_mapping, window_block_table, fmt
    )


def step(
    layer: Layer,
    batch: Batch,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    out: torch.Tensor,
    *,
    kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    fills_window: bool = True,
    workspace: torch.Tensor | None = None,
) -> None:
    """One layer's step, all of the above: see ``step/reference.py``.

    Args:
        workspace: as of :func:`sparse_attention`.

    Raises:
        ValueError: a shape or dtype does not fit the format; names the argument.
    """
    form = (batch.form, form_of(query, key, value, pages, window, out, *(kept or ())))
    if layer.checked != form:
        _check_step(layer, batch, query, key, value, pages, window, out, kept)
        layer.checked = form
    scratch = {} if workspace is None else {"workspace": workspace}
    implementation(pages.device.type).step(
        layer,
        batch,
        query,
        key,
        value,
        pages,
        window,
        out,
        kept=kept,
        fills_window=fills_window,
        **scratch,
    )


def _check_step(
    layer: Layer,
    batch: Batch,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    out: torch.Tensor,
    kept: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    fmt = layer.format
    if key is None and kept is None:
        raise ValueError("key is missing: no other layer has kept the keys of this step")
    if key is not None and kept is not None:
        _check_vectors(fmt, key=key, kept_key=kept[0], kept_value=kept[1])
    key, value = kept if key is None else (key, value)
    options = (layer.sliding_window, layer.soft_cap, layer.sinks)
    _check_queries(query, key, value, out, fmt, *options)
    _check_batch(
        key,
        pages,
        window,
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        batch.window_block_table,
        fmt,
    )
    _check_indices(1, torch.int64, slot_mapping=batch.slot_mapping)
    if window is not None and not fmt.window:
        raise ValueError("window is given: the format keeps no tokens whole, must be None")


def _check_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    fmt: SparseFormat,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    _check_vectors(fmt, query=query, out=out)
    _check_vectors(fmt, key=key, value=value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads: must be a multiple of key's {kv_heads}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window={sliding_window}: must be None or >= 1 (tokens)")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: must be None or > 0")
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(
            f"sinks are {sinks.dtype} of shape {tuple(sinks.shape)}: must be ({heads},) floats"
        )


def _check_batch(
    key: torch.Tensor,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor | None,
    fmt: SparseFormat,
) -> None:
    """What attention reads besides the step's own tokens."""
    _check_pages(pages, key.shape[1], fmt)
    _check_indices(1, torch.int32, query_start_loc=query_start_loc, seq_lens=seq_lens)
    _check_indices(2, torch.int32, block_table=block_table)
    if fmt.window:
        _check_window(window, window_block_table, key.shape[1], fmt)


def _check_vectors(fmt: SparseFormat, **vectors: torch.Tensor) -> None:
    """(num_tokens, heads, D) in the model dtype, all of one shape."""
    first = next(iter(vectors.values()))
    for name, x in vectors.items():
        if x.dim() != 3 or x.shape[2] != fmt.head_size or x.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: must be (num_tokens, heads, {fmt.head_size}), "
                f"the same for {' and '.join(vectors)}"
            )
        if x.dtype != fmt.dtype:
            raise ValueError(f"{name} is {x.dtype}: must be {fmt.dtype}")


def _check_feedback(
    name: str, matrix: torch.Tensor | None, fmt: VectorFormat, kv_heads: int
) -> None:
    """(num_kv_heads, D, D), of whole integer vectors."""
    if matrix is None:
        return
    if not (fmt.codec.integer and fmt.rotated):
        raise ValueError(f"{name} is given: only whole integer vectors take it, must be None")
    shape = (kv_heads, fmt.head_size, fmt.head_size)
    if matrix.shape != shape:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}: must be {shape}")


def _check_indices(dims: int, dtype: torch.dtype, **indices: torch.Tensor) -> None:
    for name, x in indices.items():
        if x.dim() != dims or x.dtype != dtype:
            raise ValueError(f"{name} is {x.dim()}-d {x.dtype}: must be {dims}-d {dtype}")


def _check_pages(pages: torch.Tensor, kv_heads: int, fmt: SparseFormat) -> None:
    """(num_blocks, num_kv_heads, block_size, token_bytes) uint8, each tile contiguous."""
    width = fmt.token_bytes
    if pages.dim() != 4 or pages.shape[1] != kv_heads or pages.shape[3] != width:
        raise ValueError(
            f"pages have shape {tuple(pages.shape)}: "
            f"must be (num_blocks, {kv_heads}, block_size, {width})"
        )
    if pages.dtype != torch.uint8 or pages.stride()[2:] != (width, 1):
        raise ValueError(
            f"pages are {pages.dtype} with strides {pages.stride()}: "
            f"must be torch.uint8 with contiguous tiles"
        )


def _check_window(
    window: torch.Tensor | None,
    window_block_table: torch.Tensor | None,
    kv_heads: int,
    fmt: SparseFormat,
) -> None:
    """(num_blocks, num_kv_heads, r, slot elements) window dtype and (num_reqs, m) int32."""
    if window is None or window_block_table is None:
        raise ValueError(f"window is missing: the format keeps {fmt.window} tokens whole")
    width = fmt.slot_elements
    if window.dim() != 4 or window.shape[1] != kv_heads or window.shape[3] != width:
        raise ValueError(
            f"window has shape {tuple(window.shape)}: "
            f"must be (num_blocks, {kv_heads}, slots, {width})"
        )
    contiguous = window.stride(3) == 1 and (window.shape[2] == 1 or window.stride(2) == width)
    if window.dtype != fmt.window_dtype or not contiguous:
        raise ValueError(
            f"window is {window.dtype} with strides {window.stride()}: "
            f"must be {fmt.window_dtype} with contiguous slots"
        )
    _check_indices(2, torch.int32, window_block_table=window_block_table)
    slots = window.shape[2] * window_block_table.shape[1]
    if slots < fmt.min_ring_slots:
        raise ValueError(f"the ring has {slots} slots: must be at least {fmt.min_ring_slots}")
