"""Batches padded to the size of a captured CUDA graph: what is padding changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compare import assert_attention, assert_same_bytes
from helpers import REFERENCE, CaseSpec, Ops, Request
from histories import build_case as build

from vllm_sparsekv.kernels.attention.triton import sparse_attention
from vllm_sparsekv.kernels.pack.triton import pack
from vllm_sparsekv.kernels.window.triton import write_window

TRITON = Ops(pack, sparse_attention, write_window)


def padded_rows(case, rows: int, block: int):
    """The case with ``rows`` more requests of length 0 whose tables say ``block``."""
    last = case.query_start_loc[-1:].expand(rows)
    lengths = torch.zeros(rows, dtype=torch.int32)

    def table(blocks: torch.Tensor) -> torch.Tensor:
        return torch.cat([blocks, torch.full((rows, blocks.shape[1]), block, dtype=torch.int32)])

    return dataclasses.replace(
        case,
        query_start_loc=torch.cat([case.query_start_loc, last]),
        seq_lens=torch.cat([case.seq_lens, lengths]),
        block_table=table(case.block_table),
        window_block_table=table(case.window_block_table),
    )


@pytest.mark.parametrize("block", [0, -1])
@pytest.mark.parametrize("query_len", [1, 3])
def test_padded_rows_are_harmless(query_len, block):
    """Real rows come out right; padding tokens, pages and rings of others stay as they were."""
    spec = CaseSpec(
        (Request(70, query_len), Request(5, query_len), Request(0, query_len)),
        num_kv_heads=1,
        key_sparsity=0.0,
        key_dtype="int4",
        value_dtype="int4",
        dtype=torch.bfloat16,
        window=16,
        lookahead=query_len - 1,
        padding=2 * query_len,
    )
    case, reference = padded_rows(build(spec), 2, block), build(spec)
    assert_attention(case, TRITON, 1.2e-2)
    case.write_step(TRITON)
    reference.write_step(REFERENCE)
    assert_same_bytes(case.pages, reference.pages)
    assert_same_bytes(case.window, reference.window)


@pytest.mark.parametrize("block", [0, -1])
def test_requests_as_in_capture(block):
    """No history and no blocks of their own: each token attends to itself alone."""
    spec = CaseSpec((Request(0, 1), Request(0, 1)), num_kv_heads=1, group=4, window=16, padding=0)
    case = build(spec)
    case.block_table.fill_(block)
    case.window_block_table.fill_(block)
    out = case.attend(TRITON)
    assert torch.equal(out, case.value.repeat_interleave(4, dim=1))
    window = case.window.clone()
    case.slot_mapping.fill_(-1)
    case.write_step(TRITON)
    assert_same_bytes(case.window, window)
