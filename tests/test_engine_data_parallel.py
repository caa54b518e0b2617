"""Two data-parallel ranks, each with a cache of its own, give one process's texts at sparsity 0."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import models
import pytest
from engines import LOSSLESS, engine, generate, texts
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.usefixtures("engines_in_process")

RANKS = 2
MAX_TOKENS = 16


def prompts() -> list[list[int]]:
    return models.prompts(0, (30, 100, 200, 250))


async def answers(options: dict[str, Any]) -> list[list[tuple[list[int], int]]]:
    """Of every prompt on rank 0, on rank 1 and then on both: tokens, and how many were kept.

    Requests of a round run at the same time.
    """
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def ask(tokens: list[int], rank: int, name: str) -> tuple[list[int], int]:
        given = {"prompt_token_ids": tokens}
        async for output in llm.generate(given, params, name, data_parallel_rank=rank):
            last = output
        return list(last.outputs[0].token_ids), last.num_cached_tokens

    try:
        return [
            await asyncio.gather(
                *(
                    ask(tokens, rank, f"{turn} {rank} {index}")
                    for rank in ranks
                    for index, tokens in enumerate(prompts())
                )
            )
            for turn, ranks in enumerate(([0], [1], [0, 1]))
        ]
    finally:
        llm.shutdown()


def test_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tiny model; each rank would bind its threads to cores of its own, of which there may be two.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options: dict[str, Any] = {
        "model": str(models.build("llama", tmp_path)),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": 64,
        "kv_cache_memory_bytes": 1 << 26,
        "enforce_eager": True,
    }
    with engine(None, **options) as llm:
        expected = texts(generate(llm, prompts(), MAX_TOKENS, detokenize=False))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # a process a rank
    sparse = {
        "attention_backend": "sparsekv",
        "additional_config": {"sparsekv": LOSSLESS},
        "data_parallel_size": RANKS,
    }
    first, other, again = asyncio.run(answers(options | sparse))
    for found in (first, other, again[: len(expected)], again[len(expected) :]):
        assert [tokens for tokens, _ in found] == expected
    # What one rank has kept the other has not.
    assert [kept for _, kept in first] == [kept for _, kept in other] == [0, 0, 0, 0]
    assert [kept for _, kept in again] == [0, 64, 192, 192] * RANKS
