"""At sparsity 0 drafts change no text, and as many of them are taken as with the dense cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import drafters
import models
import pytest
from engines import engine, generate, metric, texts
from vllm import LLM
from vllm.utils.import_utils import has_arctic_inference
from vllm.v1.executor.uniproc_executor import UniProcExecutor

pytestmark = pytest.mark.usefixtures("engines_in_process")

LOSSLESS = {"key_dtype": "auto", "value_dtype": "auto", "window": 24}
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
LENGTHS = (3, 64, 121, 217, 300)
BLOCKS = {"eagle": 160, "eagle3": 160, "mtp": 160}
"""For all of ``LENGTHS``, and fewer than the crowd fills. Where the drafter has one layer, each of
the target's takes blocks of its own; else 64 do."""


class Run(NamedTuple):
    """What an engine answered.

    Attributes:
        texts: of the prompts of ``LENGTHS``, read in chunks, and of the last one twice more.
        drafted: tokens drafted and taken until then.
    """

    texts: list[list[list[int]]]
    drafted: tuple[float, float]


@contextmanager
def start(
    model: Path, settings: dict[str, Any] | None, speculative: dict[str, Any] | None = None
) -> Iterator[LLM]:
    method = (speculative or {}).get("method", "")
    options: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if method == "ngram":
            # It loads numba, and vLLM's CPU build starts no further engine in such a process. So
            # the engine gets one; by this class its worker is in it, too.
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
            options["distributed_executor_backend"] = UniProcExecutor
        with engine(
            settings,
            model=str(model),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=512,
            max_num_batched_tokens=128,
            num_gpu_blocks_override=BLOCKS.get(method, 64),
            kv_cache_memory_bytes=1 << 27,
            speculative_config=speculative,
            **options,
        ) as llm:
            yield llm


def measure(llm: LLM) -> Run:
    given = models.prompts(0, LENGTHS)
    found = [texts(generate(llm, some, 40)) for some in (given, given[-1:], given[-1:])]
    drafted = tuple(
        metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")
    )
    # Who is preempted loses drafts, and block sizes decide who is.
    assert metric(llm, "vllm:num_preemptions") == 0
    return Run(found, drafted)


def crowd(llm: LLM) -> list[list[int]]:
    """Texts of requests that preempt each other."""
    return texts(generate(llm, models.prompts(1, (60,) * 100), 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("drafters")
    target = drafters.target(made / "llama")
    drafters.target(made / "mtp", "ernie4_5_moe")
    for kind in (drafters.draft_model, drafters.eagle, drafters.eagle3):
        kind(target, made / kind.__name__)
    return made


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def target(folder: Path, method: str) -> Path:
    return folder / ("mtp" if method == "mtp" else "llama")


@pytest.fixture(scope="module")
def speculative(folder: Path, method: str) -> dict[str, Any]:
    given = {"method": method, "num_speculative_tokens": 1 if method == "mtp" else drafters.TOKENS}
    if method == "ngram":
        given |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif (folder / method).exists() and method != "mtp":
        given["model"] = str(folder / method)
    return given


@cache
def plain(target: Path) -> tuple[Run, list[list[int]]]:
    """The dense engine's answers without drafts."""
    with start(target, None) as llm:
        return measure(llm), crowd(llm)


def test_drafts_change_no_text_and_are_taken_as_often(target: Path, speculative: dict) -> None:
    expected, expected_crowd = plain(target)
    with start(target, None, speculative) as llm:
        dense = measure(llm)
    with start(target, LOSSLESS, speculative) as llm:
        sparse = measure(llm)
        assert metric(llm, "vllm:prefix_cache_hits") > 0
        assert crowd(llm) == expected_crowd
        assert metric(llm, "vllm:num_preemptions") > 0
    assert sparse.texts == expected.texts
    assert sparse.drafted == dense.drafted
    assert sparse.drafted[1] > 0
