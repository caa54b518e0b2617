"""Start real vLLM engines on the demo model for tests, and read what they did."""

from __future__ import annotations

import functools
import gc
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from vllm import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / ".cache" / "smollm2-135m-instruct"
PROSE = ROOT / "tests" / "data" / "prose.txt"
LOSSLESS = {"key_dtype": "auto", "value_dtype": "auto", "window": 24}
"""Settings under which answers are the dense engine's; the window leaves most tokens to pages."""


@functools.cache
def _replace_kernels(platform: type) -> None:
    """vLLM looks through all modules for Triton kernels to replace, at every start of an engine."""
    platform.register_triton_kernel_overrides()


@contextmanager
def quick_starts() -> Iterator[None]:
    """For engines in this process, one after the other.

    Most of a start goes into vLLM's collections of garbage, which look at every object of torch and
    transformers; those that are there already are left out.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    _replace_kernels(platform)
    gc.collect()
    gc.freeze()
    with (
        mock.patch.object(gc, "freeze", lambda: None),
        mock.patch.object(gc, "unfreeze", lambda: None),
        mock.patch.object(platform, "register_triton_kernel_overrides", staticmethod(lambda: None)),
        mock.patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
    ):
        yield
    gc.unfreeze()


@contextmanager
def engine(settings: dict[str, Any] | None, **overrides: Any) -> Iterator[LLM]:
    """A running engine: sparse with these settings, dense when they are None."""
    if not (MODEL / "config.json").exists():
        raise FileNotFoundError(f"{MODEL} is missing: run `make model`")
    options: dict[str, Any] = {
        "model": str(MODEL),
        "max_model_len": 2048,
        "kv_cache_memory_bytes": 1 << 29,
        "enforce_eager": True,
        "disable_log_stats": False,
    }
    if settings is not None:
        options |= {
            "attention_backend": "sparsekv",
            "additional_config": {"sparsekv": settings},
        }
    llm = LLM(**(options | overrides))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def prose_tokens(llm: LLM, count: int) -> list[int]:
    """The first tokens of the English test text."""
    tokens = llm.get_tokenizer().encode(PROSE.read_text())
    assert len(tokens) >= count, f"{PROSE} has only {len(tokens)} tokens"
    return tokens[:count]


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int, **sampling: Any) -> list[Any]:
    """Greedy generation from token prompts; vLLM's outputs in order."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **sampling)
    prompts = [{"prompt_token_ids": tokens} for tokens in prompts]
    return llm.generate(prompts, params, use_tqdm=False)


def texts(outputs: list[Any]) -> list[list[int]]:
    """Generated token ids."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_logprobs(output: Any) -> dict[int, float]:
    """Log-probabilities of the first generated token's candidates, by token id."""
    return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}


def assert_close(actual: dict[int, float], expected: dict[int, float], error: float) -> None:
    """Candidates of two answers agree in log-probability."""
    shared = actual.keys() & expected.keys()
    assert len(shared) >= 18, "the most likely tokens differ"
    assert max(abs(actual[token] - expected[token]) for token in shared) <= error


def perplexity(llm: LLM, tokens: list[int]) -> float:
    """exp of the mean negative log-probability of tokens[1:], read from ``prompt_logprobs``."""
    output = generate(llm, [tokens], 1, prompt_logprobs=0)[0]
    logprobs = [
        entry[token].logprob
        for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(logprobs) / len(logprobs))


def metric(llm: LLM, name: str) -> float:
    """Current value of a vLLM counter or gauge."""
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def kv_cache_tokens(llm: LLM) -> float:
    """KV cache size in tokens as vLLM reports it at ``max_model_len``."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
