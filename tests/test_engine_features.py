"""What requests and engines may ask for gives the dense engine's answers at sparsity 0."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
from engines import MODEL, assert_close, engine, first_logprobs, generate, texts
from vllm import LLM, SamplingParams
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("engines_in_process")

LOSSLESS = {"key_dtype": "auto", "value_dtype": "auto", "window": 24}
VOCABULARY = 49152
"""Of the tokenizer, which structured output needs."""
LOGPROB_ERROR = 2e-3


def start(model: Path, settings: dict[str, Any] | None, **options: Any) -> Any:
    return engine(
        settings,
        model=str(model),
        tokenizer=str(MODEL),
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 27,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def sparse(model: Path) -> Iterator[LLM]:
    with start(model, LOSSLESS, max_num_seqs=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def one_at_a_time(model: Path) -> Iterator[LLM]:
    """It reads prompts in chunks, which vLLM's CPU build cannot with seeds of requests."""
    with start(model, LOSSLESS, max_num_seqs=1, max_num_batched_tokens=128) as llm:
        yield llm


@pytest.fixture(scope="module")
def dense(model: Path) -> Iterator[LLM]:
    with start(model, None) as llm:
        yield llm


def prompts(count: int, length: int = 100) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]


def sampled(llm: LLM, **sampling: Any) -> list[list[list[int]]]:
    """Token ids by prompt and by answer."""
    params = SamplingParams(max_tokens=16, ignore_eos=True, **sampling)
    given = [{"prompt_token_ids": tokens} for tokens in prompts(3)]
    outputs = llm.generate(given, params, use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "sampling",
    [
        {"n": 4, "temperature": 1.0, "seed": 7},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 1},
    ],
    ids=lambda sampling: ", ".join(sampling),
)
def test_sampling(sparse: LLM, dense: LLM, sampling: dict[str, Any]) -> None:
    found = sampled(sparse, **sampling)
    assert found == sampled(dense, **sampling)
    assert len({tuple(answer) for answers in found for answer in answers}) == 3 * sampling.get(
        "n", 1
    )


def test_beam_search(sparse: LLM, dense: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    given = [{"prompt_token_ids": tokens} for tokens in prompts(1)]
    found, expected = (
        [beam.tokens for output in llm.beam_search(given, params) for beam in output.sequences]
        for llm in (sparse, dense)
    )
    assert found == expected and len(found) == 3


def test_structured_output(sparse: LLM, dense: LLM) -> None:
    given = [{"prompt_token_ids": tokens} for tokens in prompts(8)]
    pattern = r"[0-9]{8}-[a-f]{8}"
    params = SamplingParams(
        temperature=0,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(regex=pattern),
    )
    found, expected = (
        [output.outputs[0].text for output in llm.generate(given, params, use_tqdm=False)]
        for llm in (sparse, dense)
    )
    assert found == expected
    assert len(set(found)) > 4
    assert all(re.fullmatch(pattern, text) for text in found)


def test_prompt_logprobs(one_at_a_time: LLM, dense: LLM) -> None:
    """Of a prompt that is read in chunks, each token's by what came before it."""
    (tokens,) = prompts(1, 300)
    found, expected = (
        generate(llm, [tokens], 1, prompt_logprobs=0)[0].prompt_logprobs[1:]
        for llm in (one_at_a_time, dense)
    )
    for token, actual, wanted in zip(tokens[1:], found, expected, strict=True):
        assert abs(actual[token].logprob - wanted[token].logprob) <= LOGPROB_ERROR


def test_reset_prefix_cache(sparse: LLM, dense: LLM) -> None:
    (tokens,) = prompts(1, 200)
    assert sparse.reset_prefix_cache()
    (expected,) = generate(dense, [tokens], 1, logprobs=20)
    for cached in (0, 192, 0):
        (answer,) = generate(sparse, [tokens], 1, logprobs=20)
        assert answer.num_cached_tokens == cached
        assert_close(first_logprobs(answer), first_logprobs(expected), LOGPROB_ERROR)
        if cached:
            assert sparse.reset_prefix_cache()


def test_one_request_at_a_time_and_many(sparse: LLM, one_at_a_time: LLM, dense: LLM) -> None:
    crowd = prompts(130, 30)
    expected = texts(generate(dense, crowd, 6))
    for llm, count, seqs in ((sparse, 130, 128), (one_at_a_time, 20, 1)):
        assert llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == seqs
        assert texts(generate(llm, crowd[:count], 6)) == expected[:count]
