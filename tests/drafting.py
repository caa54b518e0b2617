"""Engines with drafts: what they are started with, and what they answer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import drafters
import models
from engines import engine, generate, metric, texts
from vllm import LLM

LENGTHS = (3, 64, 121, 217, 300)


class Run(NamedTuple):
    """What an engine answered.

    Attributes:
        texts: of the prompts of ``LENGTHS``, read in chunks, and of the last one twice more.
        drafted: tokens drafted and taken until then.
    """

    texts: list[list[list[int]]]
    drafted: tuple[float, float]


def build(folder: Path) -> None:
    """Write the targets ``llama`` and ``mtp`` and a drafter by method."""
    target = drafters.target(folder / "llama")
    drafters.target(folder / "mtp", "ernie4_5_moe")
    for kind in (drafters.draft_model, drafters.eagle, drafters.eagle3):
        kind(target, folder / kind.__name__)


def target(folder: Path, method: str) -> Path:
    return folder / ("mtp" if method == "mtp" else "llama")


def speculative(folder: Path, method: str) -> dict[str, Any]:
    """vLLM's settings of a method."""
    given = {"method": method, "num_speculative_tokens": 1 if method == "mtp" else drafters.TOKENS}
    if method == "ngram":
        given |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    elif (folder / method).exists() and method != "mtp":
        given["model"] = str(folder / method)
    return given


def start(
    model: Path,
    settings: dict[str, Any] | None,
    speculative: dict[str, Any] | None,
    blocks: int,
) -> AbstractContextManager[LLM]:
    """An engine with ``blocks`` in its pool."""
    return engine(
        settings,
        model=str(model),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=512,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=1 << 27,
        speculative_config=speculative,
    )


def measure(llm: LLM, max_tokens: int) -> Run:
    given = models.prompts(0, LENGTHS)
    found = [texts(generate(llm, some, max_tokens)) for some in (given, given[-1:], given[-1:])]
    drafted = tuple(
        metric(llm, f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted")
    )
    # Who is preempted loses drafts, and block sizes decide who is.
    assert metric(llm, "vllm:num_preemptions") == 0
    return Run(found, drafted)


def crowd(llm: LLM, requests: int, max_tokens: int) -> list[list[int]]:
    """Texts of requests that come at once."""
    return texts(generate(llm, models.prompts(1, (60,) * requests), max_tokens))
