"""What 50 % sparsity costs in perplexity and brings in capacity, against the dense engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engines import engine, first_logprobs, generate, kv_cache_tokens, perplexity, prose_tokens
from vllm import LLM

pytestmark = pytest.mark.usefixtures("engines_in_process")

HALF = {
    "key_sparsity": 0.5,
    "value_sparsity": 0.5,
    "key_dtype": "auto",
    "value_dtype": "auto",
    "window": 64,
}
# Steps of 64 tokens: all but the newest 64 to 128 tokens of history are read pruned.
OPTIONS = {"dtype": "float32", "max_num_batched_tokens": 64, "max_model_len": 8192}
NUM_TOKENS = 2000


@pytest.fixture(scope="module")
def dense() -> dict[str, float]:
    with engine(None, **OPTIONS) as llm:
        return {
            "perplexity": perplexity(llm, prose_tokens(llm, NUM_TOKENS)),
            "tokens": kv_cache_tokens(llm),
        }


@pytest.fixture(scope="module")
def sparse(dense: dict) -> Iterator[LLM]:
    with engine(HALF, **OPTIONS) as llm:
        yield llm


def test_perplexity_at_half_sparsity(sparse: LLM, dense: dict) -> None:
    ratio = perplexity(sparse, prose_tokens(sparse, NUM_TOKENS)) / dense["perplexity"]
    assert ratio <= 1.02
    assert ratio != 1.0, "the history was not read pruned"


def test_capacity_at_half_sparsity(sparse: LLM, dense: dict) -> None:
    bytes_ratio = 512 / 272  # head_size 64: 2 * 256 dense, 2 * (8 + 128) sparse
    assert kv_cache_tokens(sparse) / dense["tokens"] >= 0.95 * bytes_ratio


def test_generation_continues_from_a_prefix_hit(sparse: LLM) -> None:
    tokens = prose_tokens(sparse, 400)
    assert sparse.reset_prefix_cache()
    cold, warm = (generate(sparse, [tokens], 12, logprobs=20)[0] for _ in range(2))
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == 384
    # After the hit the newest 64 tokens are read pruned, not dense, so logprobs may move a little.
    before, after = first_logprobs(cold), first_logprobs(warm)
    likely = [token for token in before if before[token] > -3]
    assert max(abs(before[token] - after[token]) for token in likely) <= 0.5
