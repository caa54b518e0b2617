"""Write the dense window in Triton: one program per token and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.arguments import Vectors
from vllm_sparsekv.kernels.triton import find_request


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
    """As :func:`vllm_sparsekv.kernels.window.reference.write_window`."""
    num_reqs, blocks_per_ring = window_block_table.shape
    num_tokens = min(key.shape[0], slot_mapping.shape[0])
    if num_tokens == 0 or num_reqs == 0:
        return
    tags = window.view(torch.int32)
    _write_window[num_tokens, key.shape[1]](
        Vectors(key, *key.stride()[:2]),
        Vectors(value, *value.stride()[:2]),
        window,
        tags,
        query_start_loc,
        seq_lens,
        slot_mapping,
        window_block_table,
        num_reqs,
        *window.stride()[:3],
        *tags.stride()[:3],
        window_block_table.stride(0),
        blocks_per_ring * window.shape[2],
        SLOTS_PER_BLOCK=window.shape[2],
        D=fmt.head_size,
        PADDED=triton.next_power_of_2(fmt.head_size),
        TAG=2 * fmt.head_size * fmt.dtype.itemsize // 4,
    )


@triton.jit(do_not_specialize=["num_reqs", "ring"])
def _write_window(
    key,
    value,
    window,
    tags,
    query_start_loc,
    seq_lens,
    slot_mapping,
    window_block_table,
    num_reqs,
    block_stride,
    head_stride,
    slot_stride,
    tag_block_stride,
    tag_head_stride,
    tag_slot_stride,
    table_stride,
    ring,
    SLOTS_PER_BLOCK: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TAG: tl.constexpr,
):
    token = tl.program_id(0)
    if token < tl.load(query_start_loc + num_reqs):
        write_slot(
            key,
            value,
            window,
            tags,
            query_start_loc,
            seq_lens,
            slot_mapping,
            window_block_table,
            num_reqs,
            block_stride,
            head_stride,
            slot_stride,
            tag_block_stride,
            tag_head_stride,
            tag_slot_stride,
            table_stride,
            ring,
            token,
            tl.program_id(1),
            SLOTS_PER_BLOCK,
            D,
            PADDED,
            TAG,
        )


@triton.jit
def write_slot(
    key,
    value,
    window,
    tags,
    query_start_loc,
    seq_lens,
    slot_mapping,
    window_block_table,
    num_reqs,
    block_stride,
    head_stride,
    slot_stride,
    tag_block_stride,
    tag_head_stride,
    tag_slot_stride,
    table_stride,
    ring,
    token,
    head,
    SLOTS_PER_BLOCK: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TAG: tl.constexpr,
):
    """One token of a request to its slot, if it is one of the newest and has one."""
    if tl.load(slot_mapping + token) >= 0:
        request = find_request(query_start_loc, num_reqs, token, 0)
        length = tl.load(seq_lens + request)
        position = length - tl.load(query_start_loc + request + 1) + token
        place = position % ring
        block = tl.load(window_block_table + request * table_stride + place // SLOTS_PER_BLOCK).to(
            tl.int64
        )
        if position >= length - ring and block > 0:
            slot = place % SLOTS_PER_BLOCK
            element = tl.arange(0, PADDED)
            inside = element < D
            target = window + block * block_stride + head * head_stride + slot * slot_stride
            wide = token.to(tl.int64)
            k = key.start + wide * key.token_stride + head * key.head_stride + element
            v = value.start + wide * value.token_stride + head * value.head_stride + element
            tl.store(target + element, tl.load(k, mask=inside), mask=inside)
            tl.store(target + D + element, tl.load(v, mask=inside), mask=inside)
            tag = block * tag_block_stride + head * tag_head_stride + slot * tag_slot_stride
            tl.store(tags + tag + TAG, position + 1)
