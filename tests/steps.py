"""A layer's step in Triton's three launches against a composition of the other Triton kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_same_bytes
from helpers import Case, CaseSpec, Request
from histories import build_case
from layers import batch_of
from ragged import batches

from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.attention.triton import sparse_attention
from vllm_sparsekv.kernels.pack.triton import pack
from vllm_sparsekv.kernels.step.triton import step
from vllm_sparsekv.kernels.window.triton import write_window

BF16, FP16 = torch.bfloat16, torch.float16
WHOLE = {"key_sparsity": 0.0, "value_sparsity": 0.0}
INTEGERS = WHOLE | {"key_dtype": "int4", "value_dtype": "int3"}
BANDS = WHOLE | {"key_dtype": "int4_int2", "value_dtype": "int2"}
LONG = (Request(300, 1), Request(3, 1), Request(0, 1))
SPECS = [
    pytest.param(replace(CaseSpec(requests), **chosen), id=name)
    for name, requests, chosen in (
        ("balanced", batches(64)["decode"], INTEGERS | {"group": 3, "dtype": FP16}),
        ("balanced in splits", LONG, INTEGERS | {"num_kv_heads": 1, "group": 4, "dtype": FP16}),
        ("balanced, bfloat16", batches(64)["hits"], INTEGERS | {"dtype": BF16}),
        ("balanced, D=256", LONG, INTEGERS | {"head_size": 256, "num_kv_heads": 1}),
        ("capacity, D=96", LONG, BANDS | {"head_size": 96, "dtype": FP16}),
        ("one side", LONG, WHOLE | {"key_dtype": "fp8", "value_dtype": "int4", "dtype": BF16}),
        ("pruned", LONG, {"key_dtype": "fp8", "value_dtype": "fp8", "group": 20}),
        ("no window", LONG, INTEGERS | {"window": 0, "group": 1}),
        ("scores", LONG, INTEGERS | {"sliding_window": 50, "soft_cap": 1.5, "sinks": True}),
        ("padded", LONG, INTEGERS | {"padding": 3, "dtype": FP16}),
    )
]


def run(
    case: Case, layer: api.Layer, key: torch.Tensor | None, value: torch.Tensor | None, **options
) -> torch.Tensor:
    layer.sinks = case.sinks
    out = torch.full_like(case.query, 12345)
    step(layer, batch_of(case), case.query, key, value, case.pages, case.window, out, **options)
    return out


def assert_step(spec: CaseSpec, layer: api.Layer, device: str = "cpu") -> None:
    """Rows in the basis and outputs agree to rounding; what follows from rows to the last bit."""
    case, by_hand = build_case(spec, device=device), build_case(spec, device=device)
    basis, tokens = layer.basis, case.num_tokens
    kept = torch.full_like(case.key, torch.nan), torch.full_like(case.value, torch.nan)
    out = run(case, layer, case.key, case.value, kept=kept)
    eps = torch.finfo(spec.dtype).eps
    wanted = basis.stored_key(case.key), basis.stored_value(case.value)
    for rows, exact in zip(kept, wanted, strict=True):
        size = exact[:tokens].abs().max().item()
        atol = (16 if spec.dtype == torch.float32 else 2) * eps * size
        torch.testing.assert_close(rows[:tokens], exact[:tokens], rtol=2 * eps, atol=atol)

    by_hand.key[:], by_hand.value[:] = kept
    pack(
        by_hand.key,
        by_hand.value,
        by_hand.slot_mapping,
        by_hand.pages,
        spec.format,
        key_feedback=basis.key_feedback,
        value_feedback=basis.value_feedback,
    )
    stored = torch.full_like(case.query, 12345)
    sparse_attention(
        basis.asked(case.query),
        *kept,
        by_hand.pages,
        by_hand.window,
        by_hand.query_start_loc,
        by_hand.seq_lens,
        by_hand.block_table,
        by_hand.window_block_table,
        layer.scale,
        spec.format,
        stored,
        sliding_window=spec.sliding_window,
        soft_cap=spec.soft_cap,
        sinks=case.sinks,
    )
    error = {torch.float32: 3e-5, FP16: 6e-3, BF16: 4e-2}[spec.dtype]
    restored = basis.restored(stored)[:tokens]
    torch.testing.assert_close(out[:tokens], restored, rtol=error, atol=error)
    assert (out[tokens:] == 12345).all()
    assert_same_bytes(case.pages, by_hand.pages)
    if case.window is not None:
        write_window(
            *kept,
            by_hand.window,
            by_hand.query_start_loc,
            by_hand.seq_lens,
            by_hand.slot_mapping,
            by_hand.window_block_table,
            spec.format,
        )
        assert_same_bytes(case.window, by_hand.window)
