"""Engines on vLLM's model runner V2 give the dense engine's texts at sparsity 0.

vLLM runs it on CPUs where Triton compiles for them. Here Triton interprets vLLM's kernels; ours are
the native ones. A drafter's layers are sparse, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import drafting
import pytest
from drafting import Run, measure
from engines import LOSSLESS, metric
from vllm import LLM
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_sparsekv.engine.layers import sparse_layers

pytestmark = pytest.mark.usefixtures("engines_in_process")

SETTINGS = LOSSLESS | {"basis": "none"}
MAX_TOKENS = 20
BLOCKS = 32
"""For all of ``LENGTHS``, and fewer than the crowd fills."""
DRAFTER_LAYERS = {"draft_model": 2, "eagle3": 1, "mtp": 1}
"""By method. Eagle does nothing that eagle3 does not; nothing interprets n-grams' kernel."""


@pytest.fixture(scope="module", autouse=True)
def runner_v2() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drafters")
    drafting.build(made)
    return made


def crowd(llm: LLM) -> list[list[int]]:
    """Texts of requests that preempt each other."""
    return drafting.crowd(llm, 16, 20)


@cache
def plain(target: Path) -> tuple[Run, list[list[int]]]:
    """The dense engine's answers without drafts."""
    with drafting.start(target, None, None, BLOCKS) as llm:
        return measure(llm, MAX_TOKENS), crowd(llm)


def runner(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.mark.parametrize("method", [None, *DRAFTER_LAYERS])
def test_texts_are_the_dense_engine_s(folder: Path, method: str | None) -> None:
    target = drafting.target(folder, method)
    expected, expected_crowd = plain(target)
    speculative, dense = None, expected
    if method:
        speculative = drafting.speculative(folder, method)
        with drafting.start(target, None, speculative, BLOCKS) as llm:
            dense = measure(llm, MAX_TOKENS)
    with drafting.start(target, SETTINGS, speculative, BLOCKS) as llm:
        assert type(runner(llm)) is CPUModelRunner
        sparse = measure(llm, MAX_TOKENS)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert crowd(llm) == expected_crowd
        assert metric(llm, "vllm:num_preemptions") > 0
        layers = sparse_layers(llm.llm_engine.vllm_config)
    assert len(layers) == 4 + DRAFTER_LAYERS.get(method, 0)
    assert sparse.texts == expected.texts
    assert sparse.drafted == dense.drafted
    assert (sparse.drafted[1] > 0) == bool(method)
