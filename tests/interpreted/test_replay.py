"""Launches recorded once serve every uniform batch of their size, as in a replayed CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import uniform
from helpers import Ops

from vllm_sparsekv.kernels.attention import triton as attention
from vllm_sparsekv.kernels.pack import triton as pack
from vllm_sparsekv.kernels.window import triton as window

TRITON = Ops(pack.pack, attention.sparse_attention, window.write_window)


class Recorded:
    """Stands in for a kernel: notes its launches, grid and arguments, tensors by reference."""

    def __init__(self, kernel: Any, launches: list[Callable[[], Any]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches.append(partial(self.kernel[grid], *arguments, **constants))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    made: list[Callable[[], Any]] = []
    for module, name in (
        (pack, "_pack"),
        (attention, "_attend"),
        (attention, "merge_splits"),
        (window, "_write_window"),
    ):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), made))
    return made


@pytest.mark.parametrize("query_len", range(1, 9))
def test_replay_serves_other_batches(launches, query_len):
    specs = uniform.cases(query_len)
    step = uniform.Step(specs)
    step.run(TRITON)
    assert len(launches) == 4, "pack, attention in splits and their merge, window"
    for spec in specs:
        step.load(spec)
        for launch in launches:
            launch()
        step.check(spec, slack=1.2e-2)
