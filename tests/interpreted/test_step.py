"""A layer's step in three launches, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from compare import assert_same_bytes
from helpers import CaseSpec
from histories import build_case
from layers import layer_of
from steps import SPECS, assert_step, run

from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.attention import triton as attention
from vllm_sparsekv.kernels.pack import triton as pack
from vllm_sparsekv.kernels.step import triton as step
from vllm_sparsekv.kernels.window import triton as window


@pytest.fixture(params=["model's own", "calibrated"])
def layer(request, spec: CaseSpec) -> api.Layer:
    return layer_of(spec, request.param == "calibrated")


@pytest.mark.parametrize("spec", SPECS)
def test_step(spec, layer):
    assert_step(spec, layer)


@pytest.mark.parametrize("spec", SPECS[:1])
def test_layers_that_share_keys(spec, layer):
    """The first reader packs and keeps, the last one fills the window; both see the same keys."""
    case, alone = build_case(spec), build_case(spec)
    kept, held = (torch.empty_like(case.key), torch.empty_like(case.value)), case.window.clone()
    first = run(case, layer, case.key, case.value, kept=kept, fills_window=False)
    assert_same_bytes(case.window, held)
    pages = case.pages.clone()
    assert_same_bytes(run(case, layer, None, None, kept=kept), first)
    assert_same_bytes(case.pages, pages)
    run(alone, layer, alone.key, alone.value)
    assert_same_bytes(alone.window, case.window)


class Counted:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, name: str, kernel: Any, launches: list[str]) -> None:
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches.append(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[4], SPECS[6], SPECS[7]])
def test_launches(spec, layer, monkeypatch):
    """Three at most, whatever changes basis, and however many splits there are."""
    launches: list[str] = []
    for module in (step, attention, pack, window):
        for name in ("_prepare", "_finish", "_attend", "merge_splits", "_pack", "_write_window"):
            if kernel := vars(module).get(name):
                monkeypatch.setattr(module, name, Counted(name, kernel, launches))
    monkeypatch.setattr(torch, "einsum", None)
    monkeypatch.setattr(torch.Tensor, "__matmul__", None)
    case = build_case(spec)
    # As vLLM hands them on: parts of the result of one projection.
    query, key, value = torch.cat([case.query, case.key, case.value], 1).split(
        [case.query.shape[1], case.key.shape[1], case.value.shape[1]], 1
    )
    for name in ("contiguous", "clone", "copy_"):
        monkeypatch.setattr(torch.Tensor, name, None)
    run(replace(case, query=query), layer, key, value)
    wanted = ["_prepare", "_attend", "_finish"]
    assert launches == wanted[: 2 if spec.window == 0 and layer.basis.output is None else 3]
