"""A whole step of a layer, fused, against its definition as a composition of operations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_same_bytes
from helpers import Case, CaseSpec, Request
from histories import build_case
from layers import batch_of, layer_of
from ragged import batches

from vllm_sparsekv.format.basis import Basis
from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import ops
from vllm_sparsekv.kernels.cpu.step import step as fused

BF16 = torch.bfloat16
WHOLE = {"key_sparsity": 0.0, "value_sparsity": 0.0}
INTEGERS = WHOLE | {"key_dtype": "int4", "value_dtype": "int3"}
FORMATS = {
    "balanced": INTEGERS | {"group": 3, "dtype": BF16},
    "balanced D=256": INTEGERS | {"head_size": 256, "num_kv_heads": 1, "group": 4},
    "capacity": WHOLE
    | {"key_dtype": "int4_int2", "value_dtype": "int2", "head_size": 96, "dtype": torch.float16},
    "safe": {"key_dtype": "fp8", "value_sparsity": 0.0, "value_dtype": "int4", "dtype": BF16},
    "pruned": {"key_dtype": "fp8", "value_dtype": "fp8", "group": 20},
    "no window": INTEGERS | {"window": 0, "group": 1},
    "scores": INTEGERS | {"sliding_window": 50, "soft_cap": 1.5, "sinks": True},
}
CASES = [
    pytest.param(replace(CaseSpec(batches(64)[batch]), **fmt), id=f"{name}-{batch}")
    for name, fmt in FORMATS.items()
    for batch in ("decode", "hits", "chunks", "speculative")
] + [
    pytest.param(replace(CaseSpec(requests), **INTEGERS), id=name)
    for name, requests in {"empty rows": (Request(0, 0),), "no requests": ()}.items()
]


@pytest.fixture(params=["model's own", "calibrated"])
def layer(request, spec: CaseSpec) -> api.Layer:
    return layer_of(spec, request.param == "calibrated")


@pytest.fixture
def case(spec: CaseSpec) -> Case:
    return build_case(spec)


def run(case: Case, layer: api.Layer, step=fused, **options) -> torch.Tensor:
    layer.sinks = case.sinks
    out = torch.full_like(case.query, 12345)
    given = {"key": case.key, "value": case.value} | options
    key, value = given.pop("key"), given.pop("value")
    step(layer, batch_of(case), case.query, key, value, case.pages, case.window, out, **given)
    return out


def kept_by(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(case.key, torch.nan), torch.full_like(case.value, torch.nan)


@pytest.mark.parametrize("spec", CASES)
def test_step(spec, isa, layer, case):
    """Rows in the basis agree to rounding; what follows from them to the last bit."""
    tokens = case.num_tokens
    expected = run(build_case(spec), replace(layer), api.REFERENCE.step)[:tokens]
    plain = run(build_case(spec), replace(layer, basis=Basis()), api.REFERENCE.step)[:tokens]
    kept = kept_by(case)
    out = run(case, layer, kept=kept)
    error = {torch.float32: 3e-5, torch.float16: 6e-3, BF16: 4e-2}[spec.dtype]
    torch.testing.assert_close(out[:tokens], expected, rtol=error, atol=error)
    assert (out[tokens:] == 12345).all()

    eps = torch.finfo(spec.dtype).eps
    sums = 16 if spec.dtype == torch.float32 else 1  # of rounding, which a narrower type hides
    basis = layer.basis
    for rows, wanted in zip(
        kept, (basis.stored_key(case.key), basis.stored_value(case.value)), strict=True
    ):
        size = wanted[:tokens].abs().amax().item() if tokens else 0
        torch.testing.assert_close(
            rows[:tokens], wanted[:tokens], rtol=2 * eps, atol=sums * eps * size
        )
    by_hand = build_case(spec)
    by_hand.key[:tokens], by_hand.value[:tokens] = kept[0][:tokens], kept[1][:tokens]
    by_hand.write_step()
    if basis.key_feedback is not None or basis.value_feedback is not None:
        ops.pack(  # the reference's sums may fall to the other side of a tie
            by_hand.key,
            by_hand.value,
            by_hand.slot_mapping,
            by_hand.pages,
            spec.format,
            key_feedback=basis.key_feedback,
            value_feedback=basis.value_feedback,
        )
    assert_same_bytes(case.pages, by_hand.pages)
    if case.window is not None:
        assert_same_bytes(case.window, by_hand.window)

    # Where nobody else reads what is kept, requests without a history need no basis.
    alone = build_case(spec)
    out_alone = run(alone, layer)
    begins = [request.context == 0 for request in spec.requests for _ in range(request.query)]
    begins = torch.tensor(begins, dtype=torch.bool)
    assert_same_bytes(out_alone[:tokens][~begins], out[:tokens][~begins])
    error = {torch.float32: 3e-6, torch.float16: 2e-3, BF16: 2e-2}[spec.dtype]
    torch.testing.assert_close(out_alone[:tokens][begins], plain[begins], rtol=error, atol=error)
    assert_same_bytes(alone.pages, case.pages)
    if case.window is not None:
        assert_same_bytes(alone.window, case.window)


@pytest.mark.parametrize("spec", CASES[:4])
def test_layers_that_share_keys(spec, layer, case):
    """The first reader packs and keeps, the last one fills the window; both see the same keys."""
    kept, window = kept_by(case), case.window.clone()
    first = run(case, layer, kept=kept, fills_window=False)
    assert_same_bytes(case.window, window)
    pages = case.pages.clone()
    last = run(case, replace(layer, state=None), key=None, value=None, kept=kept)
    assert_same_bytes(last, first)
    assert_same_bytes(case.pages, pages)
    alone = build_case(spec)
    run(alone, layer)
    assert_same_bytes(alone.window, case.window)


@pytest.mark.parametrize("spec", [replace(CaseSpec(batches(64)["decode"]), **INTEGERS)])
def test_memory_that_moves(spec, layer, case):
    """A layer's cache may lie elsewhere in the next step."""
    out = run(case, layer)
    moved = build_case(spec)
    held = [moved.pages, moved.window, case.pages.fill_(255), case.window.fill_(torch.nan)]
    assert_same_bytes(run(moved, layer), out)
    assert len({x.data_ptr() for x in held}) == 4


@pytest.mark.parametrize("spec", [replace(CaseSpec(batches(64)["decode"], sinks=True), **INTEGERS)])
def test_sinks_that_change_in_place(spec, layer, case):
    """As weights that are updated while a server runs."""
    case = replace(case, sinks=case.sinks.bfloat16())
    before = run(case, layer)
    case.sinks.add_(3)
    after = run(case, layer)
    assert not torch.equal(after, before)
    assert_same_bytes(after, run(case, replace(layer, state=None)))


@pytest.mark.parametrize("spec", [replace(CaseSpec(batches(64)["decode"]), **INTEGERS)])
def test_refusals(spec, layer, case):
    arguments = {
        "key is missing": {"key": None, "value": None},
        "key has shape": {"key": case.key[..., :32]},
        "key is torch.float64": {"key": case.key.double()},
        "value has shape": {"value": case.value[:1]},
    }
    for message, options in arguments.items():
        with pytest.raises(ValueError, match=message):
            run(case, layer, api.step, **options)
    run(case, layer, api.step)
    with pytest.raises(ValueError, match="value has shape"):
        run(case, layer, api.step, value=case.value[:1])
