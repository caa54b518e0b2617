"""Write the window in Triton: one program per token and KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.arguments import Vectors, ring_arguments, ring_of
from vllm_sparsekv.kernels.triton import encode_int8, find_request


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
    _write_window[num_tokens, key.shape[1]](
        Vectors(key, *key.stride()[:2]),
        Vectors(value, *value.stride()[:2]),
        ring_arguments(window, window_block_table),
        query_start_loc,
        seq_lens,
        slot_mapping,
        num_reqs,
        blocks_per_ring * window.shape[2],
        SLOTS_PER_BLOCK=window.shape[2],
        D=fmt.head_size,
        PADDED=triton.next_power_of_2(fmt.head_size),
    )


@triton.jit(do_not_specialize=["num_reqs", "ring_slots"])
def _write_window(
    key,
    value,
    ring,
    query_start_loc,
    seq_lens,
    slot_mapping,
    num_reqs,
    ring_slots,
    SLOTS_PER_BLOCK: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
):
    token = tl.program_id(0)
    if token < tl.load(query_start_loc + num_reqs):
        write_slot(
            key,
            value,
            ring,
            query_start_loc,
            seq_lens,
            slot_mapping,
            num_reqs,
            ring_slots,
            token,
            tl.program_id(1),
            SLOTS_PER_BLOCK,
            D,
            PADDED,
        )


@triton.jit
def write_slot(
    key,
    value,
    ring,
    query_start_loc,
    seq_lens,
    slot_mapping,
    num_reqs,
    ring_slots,
    token,
    head,
    SLOTS_PER_BLOCK: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
):
    """One token of a request to its slot, if it is one of the newest and has one."""
    if tl.load(slot_mapping + token) >= 0:
        request = find_request(query_start_loc, num_reqs, token, 0)
        length = tl.load(seq_lens + request)
        position = length - tl.load(query_start_loc + request + 1) + token
        place = position % ring_slots
        slots = ring_of(ring, request, head, D)
        block = tl.load(slots.table + place // SLOTS_PER_BLOCK).to(tl.int64)
        if position >= length - ring_slots and block > 0:
            slot = place % SLOTS_PER_BLOCK
            element = tl.arange(0, PADDED)[None, :]
            inside = element < D
            wide = token.to(tl.int64)
            k = key.start + wide * key.token_stride + head * key.head_stride + element
            v = value.start + wide * value.token_stride + head * value.head_stride + element
            target = slots.start + block * slots.block_stride + slot * slots.slot_stride
            tag = slots.tags + block * slots.tag_block_stride + slot * slots.tag_slot_stride
            x = tl.load(k, mask=inside, other=0)
            y = tl.load(v, mask=inside, other=0)
            if slots.start.dtype.element_ty == tl.int8:
                x, key_step = encode_int8(x)
                y, value_step = encode_int8(y)
                # The key's in the lower half.
                tl.store(tag + 1 + tl.arange(0, 1), (key_step >> 16) | value_step)
            tl.store(target + element, x, mask=inside)
            tl.store(target + D + element, y, mask=inside)
            tl.store(tag, position + 1)
