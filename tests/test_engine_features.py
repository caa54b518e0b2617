"""What requests and engines may ask for gives the dense engine's answers at sparsity 0."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import torch
from engines import LOSSLESS, MODEL, assert_close, engine, first_logprobs, generate, texts
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

pytestmark = pytest.mark.usefixtures("engines_in_process")

VOCABULARY = 49152
"""Of the tokenizer, which structured output needs."""
LOGPROB_ERROR = 2e-3
ROUNDING = 1e-4
"""Of sums in another order, where an engine's kernels share work out by the size of the batch."""
BLOCKS = 32
"""Of the pool of who serves one request at a time."""
RANK = 8
"""Of the adapter."""


@contextmanager
def asynchronous() -> Iterator[None]:
    """Have engines schedule ahead of their answers, which vLLM's CPU platform switches off."""
    check = CpuPlatform.check_and_update_config

    def check_all_but(config: VllmConfig) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    with mock.patch.object(CpuPlatform, "check_and_update_config", staticmethod(check_all_but)):
        yield


def start(model: Path, settings: dict[str, Any] | None, **options: Any) -> Any:
    return engine(
        settings,
        model=str(model),
        tokenizer=str(MODEL),
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 27,
        enable_lora=True,
        max_lora_rank=RANK,
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    """It changes queries, keys and values of every layer."""
    folder = tmp_path_factory.mktemp("adapter")
    shape = json.loads((model / "config.json").read_text())
    modules = {
        "q_proj": shape["num_attention_heads"],
        "k_proj": shape["num_key_value_heads"],
        "v_proj": shape["num_key_value_heads"],
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(shape["num_hidden_layers"]):
        for name, heads in modules.items():
            prefix = f"base_model.model.model.layers.{index}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(
                RANK, shape["hidden_size"], generator=generator
            )
            tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(
                heads * shape["head_dim"], RANK, generator=generator
            )
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(
        json.dumps(described | {"target_modules": list(modules)})
    )
    return LoRARequest("adapter", 1, str(folder))


@pytest.fixture(scope="module")
def sparse(model: Path) -> Iterator[LLM]:
    with ExitStack() as running:
        with asynchronous():
            llm = running.enter_context(start(model, LOSSLESS, max_num_seqs=128))
        yield llm


@pytest.fixture(scope="module")
def one_at_a_time(model: Path) -> Iterator[LLM]:
    """It reads prompts in chunks, which vLLM's CPU build cannot with seeds of requests.

    Its pool is small, and requests have priorities.
    """
    with start(
        model,
        LOSSLESS,
        max_num_seqs=1,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=BLOCKS,
        scheduling_policy="priority",
    ) as llm:
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
    for llm, count, seqs, ahead in ((sparse, 130, 128, True), (one_at_a_time, 20, 1, False)):
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        assert (scheduler.max_num_seqs, scheduler.async_scheduling) == (seqs, ahead)
        assert texts(generate(llm, crowd[:count], 6)) == expected[:count]


def test_a_prompt_alone_and_among_others(sparse: LLM, dense: LLM) -> None:
    """Its log-probabilities differ by no more than the dense engine's, rounding apart."""
    crowd = prompts(16, 120)

    def moved(llm: LLM) -> float:
        assert llm.reset_prefix_cache()
        together = generate(llm, crowd, 1, logprobs=20)
        assert llm.reset_prefix_cache()
        alone = [generate(llm, [tokens], 1, logprobs=20)[0] for tokens in crowd]
        return max(
            abs(first_logprobs(one)[token] - logprob)
            for one, other in zip(alone, together, strict=True)
            for token, logprob in first_logprobs(other).items()
        )

    assert moved(sparse) <= moved(dense) + ROUNDING


def test_an_adapter(sparse: LLM, dense: LLM, adapter: LoRARequest) -> None:
    """Prefixes without the adapter are none with it.

    Not in one batch with others: there vLLM's CPU build answered some plain prompts, dense ones
    too, as their adapted twins.
    """
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    given = [{"prompt_token_ids": tokens} for tokens in prompts(2, 150)]
    (plain, adapted, again), expected = (
        [
            texts(llm.generate(given, params, use_tqdm=False, lora_request=lora))
            for lora in (None, adapter, None)
        ]
        for llm in (sparse, dense)
    )
    assert [plain, adapted, again] == expected
    assert plain == again
    assert all(one != other for one, other in zip(plain, adapted, strict=True))


def test_priorities(one_at_a_time: LLM, dense: LLM) -> None:
    """The urgent request goes first though it came last."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    crowd = prompts(3, 90)
    given = [{"prompt_token_ids": tokens} for tokens in crowd]
    outputs = one_at_a_time.generate(given, params, use_tqdm=False, priority=[2, 1, 0])
    assert texts(outputs) == texts(generate(dense, crowd, 6))
    starts = [output.metrics.scheduled_ts for output in outputs]
    assert sorted(starts, reverse=True) == starts and len(set(starts)) == 3


def test_a_pool_full_of_prefixes(one_at_a_time: LLM, dense: LLM) -> None:
    """Every block that no request holds is kept for its prefix, until another request takes it."""
    crowd = prompts(16, 260)
    expected = texts(generate(dense, crowd, 6))
    answers = [generate(one_at_a_time, [tokens], 6)[0] for tokens in crowd]
    assert texts(answers) == expected
    core = one_at_a_time.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    # All but the null block and those of the last request that no other can share.
    assert sum(block.block_hash is not None for block in pool.blocks) == BLOCKS - 3
    newest, oldest = (generate(one_at_a_time, [tokens], 6)[0] for tokens in (crowd[-1], crowd[0]))
    assert (newest.num_cached_tokens, oldest.num_cached_tokens) == (256, 0)
    assert texts([newest, oldest]) == [expected[-1], expected[0]]
