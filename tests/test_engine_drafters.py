"""At sparsity 0 drafts change no text, and as many of them are taken as with the dense cache."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import drafting
import pytest
from drafting import Run, measure
from engines import LOSSLESS, metric
from vllm import LLM
from vllm.utils.import_utils import has_arctic_inference

pytestmark = pytest.mark.usefixtures("engines_in_process")

METHODS = [
    "ngram",
    pytest.param(
        "suffix",
        marks=pytest.mark.skipif(
            not has_arctic_inference(), reason="optional: needs arctic-inference"
        ),
    ),
    "draft_model",
    "eagle",
    "eagle3",
    "mtp",
]
BLOCKS = {"eagle": 160, "eagle3": 160, "mtp": 160}
"""For all of ``LENGTHS``, and fewer than a crowd fills. Where the drafter has one layer, each of
the target's takes blocks of its own; else 64 do."""
MAX_TOKENS = 40


def start(
    model: Path, settings: dict[str, Any] | None, speculative: dict[str, Any] | None = None
) -> AbstractContextManager[LLM]:
    blocks = BLOCKS.get((speculative or {}).get("method", ""), 64)
    return drafting.start(model, settings, speculative, blocks)


def crowd(llm: LLM) -> list[list[int]]:
    """Texts of requests that preempt each other."""
    return drafting.crowd(llm, 100, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drafters")
    drafting.build(made)
    return made


@cache
def plain(target: Path) -> tuple[Run, list[list[int]]]:
    """The dense engine's answers without drafts."""
    with start(target, None) as llm:
        return measure(llm, MAX_TOKENS), crowd(llm)


@pytest.mark.parametrize("method", METHODS)
def test_drafts_change_no_text_and_are_taken_as_often(folder: Path, method: str) -> None:
    target = drafting.target(folder, method)
    speculative = drafting.speculative(folder, method)
    expected, expected_crowd = plain(target)
    with start(target, None, speculative) as llm:
        dense = measure(llm, MAX_TOKENS)
    with start(target, LOSSLESS, speculative) as llm:
        sparse = measure(llm, MAX_TOKENS)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert crowd(llm) == expected_crowd
        assert metric(llm, "vllm:num_preemptions") > 0
    assert sparse.texts == expected.texts
    assert sparse.drafted == dense.drafted
    assert sparse.drafted[1] > 0
