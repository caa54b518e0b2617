"""Answers in vLLM's default mode, which compiles the model around attention."""

from __future__ import annotations

from pathlib import Path

import models
from engines import LOSSLESS, engine, generate, quick_starts, texts
from vllm.config import CompilationMode

LENGTHS = (3, 64, 121, 217)


def test_answers_are_the_dense_engine_s(tmp_path: Path) -> None:
    options = {
        "model": str(models.build("llama", tmp_path)),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "kv_cache_memory_bytes": 1 << 27,
    }
    prompts = models.prompts(0, LENGTHS)
    with quick_starts():
        with engine(None, **options) as llm:
            expected = texts(generate(llm, prompts, 20))
        with engine(LOSSLESS | {"basis": "none"}, **options, enforce_eager=False) as llm:
            assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
            assert texts(generate(llm, prompts, 20)) == expected
