"""A step of a uniform batch as a CUDA graph has it: its tensors stay, what is in them changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from compare import assert_attention
from compare import assert_same_bytes as assert_same
from helpers import REFERENCE, UNWRITTEN, CaseSpec, Ops, Request
from histories import build_case as build

ROWS = 3
"""Requests of the captured batch."""
BLOCKS = 32
"""In a row of the block table: room for far more than any request has, so histories are split."""


def cases(query_len: int) -> list[CaseSpec]:
    """Batches for one capture: all rows taken, then one, of other lengths."""
    return [
        CaseSpec(
            tuple(Request(context, query_len) for context in contexts),
            num_kv_heads=1,
            block_size=16,
            key_sparsity=0.0,
            key_dtype="int4",
            value_dtype="int4",
            dtype=torch.bfloat16,
            window=16,
            lookahead=query_len - 1,
            padding=(ROWS - len(contexts)) * query_len,
            seed=len(contexts),
        )
        for contexts in ((40, 0, 17), (81,))
    ]


class Step:
    """The tensors of a step, first as vLLM captures it: no history, no blocks, nothing to store.

    Attributes:
        out: as of ``sparse_attention``.
    """

    def __init__(self, specs: list[CaseSpec], device: torch.device | str = "cpu") -> None:
        built = [build(spec) for spec in specs]
        first = built[0]
        blocks = max(len(case.pages) for case in built)
        ring = first.window_block_table.shape[1]
        query_len = specs[0].requests[0].query

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.case = replace(
            first,
            query=first.query.to(device),
            key=first.key.to(device),
            value=first.value.to(device),
            pages=zeros(blocks, *first.pages.shape[1:], dtype=torch.uint8),
            window=zeros(blocks, *first.window.shape[1:], dtype=first.window.dtype),
            query_start_loc=torch.arange(ROWS + 1, dtype=torch.int32, device=device) * query_len,
            seq_lens=zeros(ROWS) + query_len,
            slot_mapping=zeros(ROWS * query_len, dtype=torch.int64) - 1,
            block_table=zeros(ROWS, BLOCKS),
            window_block_table=zeros(ROWS, ring),
        )
        self.out = torch.empty_like(self.case.query)

    def run(self, ops: Ops) -> None:
        self.case.step(ops, self.out)

    def load(self, spec: CaseSpec) -> None:
        """Put a batch where the launches look for it; rows beyond its requests are empty."""
        held, case = self.case, build(spec)
        requests = len(spec.requests)
        for name in ("query", "key", "value", "slot_mapping"):
            getattr(held, name).copy_(getattr(case, name))
        held.query_start_loc.fill_(case.num_tokens)
        held.query_start_loc[: requests + 1] = case.query_start_loc
        held.seq_lens.zero_()
        held.seq_lens[:requests] = case.seq_lens
        for name in ("block_table", "window_block_table"):
            rows = getattr(case, name)
            getattr(held, name).zero_()
            getattr(held, name)[:requests, : rows.shape[1]] = rows
        for name in ("pages", "window"):
            getattr(held, name)[: len(case.pages)] = getattr(case, name)
        self.out.fill_(UNWRITTEN)

    def check(self, spec: CaseSpec, slack: float) -> None:
        """The step has answered and stored what the batch asks for."""
        case, held = build(spec), self.case

        def answered(*arguments: Any, **options: Any) -> None:
            arguments[-1].copy_(self.out)

        assert_attention(case, REFERENCE._replace(sparse_attention=answered), slack)
        case.write_step(REFERENCE)
        assert_same(held.pages[: len(case.pages)], case.pages)
        assert_same(held.window[: len(case.window)], case.window)
