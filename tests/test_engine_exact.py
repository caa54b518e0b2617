"""At sparsity 0 and float32 nothing is lost, so every path must give the dense engine's answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import (
    assert_close,
    engine,
    first_logprobs,
    generate,
    metric,
    prose_tokens,
    texts,
)
from vllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("engines_in_process")

LOSSLESS = {
    "key_sparsity": 0,
    "value_sparsity": 0,
    "key_dtype": "auto",
    "value_dtype": "auto",
}
BLOCK_SIZE = 64
NUM_BLOCKS = 40
# Small steps make prompts arrive in many chunks; few blocks make requests compete for them.
OPTIONS = {
    "dtype": "float32",
    "max_num_batched_tokens": 256,
    "max_model_len": 1536,
    "num_gpu_blocks_override": NUM_BLOCKS,
}
# Reordered float32 sums over a 30-layer model.
LOGPROB_ERROR = 2e-3


def prompts_of(llm: LLM) -> dict[str, list[int]]:
    tokens = prose_tokens(llm, 2000)
    return {
        "one token": tokens[:1],
        "one block": tokens[100 : 100 + BLOCK_SIZE],
        "window and a bit": tokens[200:270],
        "many chunks": tokens[300:1500],
    }


def measure(llm: LLM) -> dict[str, dict[int, float]]:
    prompts = prompts_of(llm)
    outputs = generate(llm, list(prompts.values()), 1, logprobs=20)
    return {name: first_logprobs(output) for name, output in zip(prompts, outputs, strict=True)}


@pytest.fixture(scope="module")
def dense() -> dict[str, dict[int, float]]:
    with engine(None, **OPTIONS) as llm:
        return measure(llm)


@pytest.fixture(scope="module")
def sparse(dense: dict) -> Iterator[LLM]:
    with engine(LOSSLESS, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def fresh(sparse: LLM) -> dict[str, dict[int, float]]:
    """Measured before any other request has touched the engine's blocks."""
    return measure(sparse)


def free_blocks(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def test_first_token_equals_dense(fresh: dict, dense: dict) -> None:
    for name, expected in dense.items():
        assert_close(fresh[name], expected, LOGPROB_ERROR)


def test_prefix_cache_hits_whole_blocks_and_changes_nothing(sparse: LLM, fresh: dict) -> None:
    tokens = prose_tokens(sparse, 1900)[1200:1900]
    assert sparse.reset_prefix_cache()
    cold = generate(sparse, [tokens], 1, logprobs=20)[0]
    warm = generate(sparse, [tokens], 1, logprobs=20)[0]
    longer = generate(sparse, [tokens[:650] + tokens[:30]], 1, logprobs=20)[0]
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == 640  # 700 tokens, 10 whole blocks
    assert longer.num_cached_tokens == 640
    assert_close(first_logprobs(warm), first_logprobs(cold), LOGPROB_ERROR)


def test_preempted_requests_give_the_same_answers(sparse: LLM, fresh: dict) -> None:
    tokens = prose_tokens(sparse, 2000)
    # 3 blocks each at first, a fourth after 4 tokens: 12 requests outgrow the 39 blocks.
    prompts = [tokens[start : start + 124] for start in range(0, 1200, 100)]
    alone = [
        answer for i in range(0, 12, 4) for answer in texts(generate(sparse, prompts[i : i + 4], 8))
    ]
    assert sparse.reset_prefix_cache()
    before = metric(sparse, "vllm:num_preemptions")
    together = texts(generate(sparse, prompts, 8))
    assert metric(sparse, "vllm:num_preemptions") > before
    assert together == alone


def test_aborted_request_frees_its_blocks(sparse: LLM, fresh: dict) -> None:
    assert sparse.reset_prefix_cache()
    idle = free_blocks(sparse)
    assert idle == NUM_BLOCKS - 1  # vLLM keeps one null block
    core = sparse.llm_engine
    tokens = prose_tokens(sparse, 500)
    core.add_request(
        "aborted", {"prompt_token_ids": tokens}, SamplingParams(max_tokens=200, ignore_eos=True)
    )
    for _ in range(5):
        core.step()
    assert free_blocks(sparse) < idle
    core.abort_request(["aborted"])
    core.step()
    assert free_blocks(sparse) == idle


def test_answers_after_heavy_block_reuse_equal_a_fresh_engine(sparse: LLM, fresh: dict) -> None:
    tokens = prose_tokens(sparse, 2000)
    churn = [tokens[start : start + 60 + 7 * start % 400] for start in range(0, 1500, 60)]
    generate(sparse, churn, 4)
    assert sparse.reset_prefix_cache()
    after = measure(sparse)
    for name, expected in fresh.items():
        assert_close(after[name], expected, LOGPROB_ERROR)
