"""Every family of models: at sparsity 0 real vLLM gives the dense engine's answers.

Engines run in this process, where one of a tiny model starts in two seconds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from engines import (
    LOSSLESS,
    ROOT,
    assert_close,
    engine,
    first_logprobs,
    generate,
    metric,
    texts,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import LLM

pytestmark = pytest.mark.usefixtures("engines_in_process")

STATE = ("qwen3_next", "granitemoehybrid")
"""With state layers."""
GEMMA = "gemma-3-270m"
"""The real one, where ``make gemma`` has built it; its sliding window is 512."""
ELSEWHERE = ("jamba", "lfm2", "ernie4_5_moe")
"""vLLM's CPU build has no selective scan for Jamba, and its short convolution gives LFM2 other
answers in a batch than alone, with the dense cache too; test_planning.py has both. ERNIE drafts in
test_engine_drafters.py."""
FAMILIES = [
    *(family for family in models.FAMILIES if family not in ELSEWHERE),
    pytest.param(GEMMA, marks=pytest.mark.gemma),
]
LENGTHS = (1, 39, 64, 70, 130, 500)
BLOCKS = 64
"""For the longest request, 512 tokens, and not for many."""


def options(family: str) -> dict[str, Any]:
    # vLLM's CPU operators need bfloat16 for a gated delta net, and no prefix caching for Mamba-2.
    chosen = {"dtype": "bfloat16" if family == "qwen3_next" else "float32"}
    if family == GEMMA:
        chosen["max_model_len"] = 1024
    if family in STATE:
        chosen["enable_prefix_caching"] = family == "qwen3_next"
    return chosen


def log_probability_error(family: str) -> float:
    return 0.15 if family == "qwen3_next" else 2e-3


def prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Random prompts; what one says depends on its length, and on its place among equal ones."""
    made = []
    for place, n in enumerate(lengths):
        generator = random.Random(f"{seed} {n} {lengths[:place].count(n)}")
        made.append([generator.randrange(3, models.VOCABULARY) for _ in range(n)])
    return made


def lengths(family: str) -> tuple[int, ...]:
    return (1, 130, 900) if family == GEMMA else LENGTHS


def few_blocks(family: str) -> dict[str, int]:
    """So that requests wait for each other's blocks."""
    if family == "qwen3_next":
        return {}  # a state fills a block of a thousand tokens
    return {"num_gpu_blocks_override": 128 if family == GEMMA else BLOCKS}


def answers(llm: LLM, lengths: tuple[int, ...] = LENGTHS) -> list[dict[int, float]]:
    """Log-probabilities after prompts of these lengths, all in one ragged batch."""
    outputs = generate(llm, prompts(0, lengths), 1, logprobs=20)
    return [first_logprobs(output) for output in outputs]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if family != GEMMA:
        return models.build(family, tmp_path_factory.mktemp(family))
    path = ROOT / ".cache" / GEMMA
    if not (path / "config.json").exists():
        pytest.skip("optional: `make gemma` builds the model")
    return path


def start(model: Path, settings: dict[str, Any] | None, **overrides: Any):
    chosen = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_batched_tokens": 2048}
    chosen |= {"kv_cache_memory_bytes": 1 << 27}
    return engine(settings, model=str(model), **chosen | overrides)


@pytest.fixture(scope="module")
def dense(family: str, model: Path) -> list[dict[int, float]]:
    with start(model, None, **options(family)) as llm:
        return answers(llm, lengths(family))


@pytest.fixture(scope="module")
def sparse(family: str, model: Path, dense: list) -> Iterator[LLM]:
    """Few blocks: a crowd of requests outgrows them."""
    with start(model, LOSSLESS, **few_blocks(family), **options(family)) as llm:
        yield llm


def test_whole_prompts_alone_and_together_and_preempted(
    family: str, sparse: LLM, dense: list
) -> None:
    crowd = prompts(1, (124,) * 26)
    together = answers(sparse, lengths(family))
    alone = [answers(sparse, (n,))[0] for n in lengths(family)]
    if few_blocks(family):
        apart = [text for i in (0, 13) for text in texts(generate(sparse, crowd[i : i + 13], 8))]
        assert sparse.reset_prefix_cache() or family in STATE
        before = metric(sparse, "vllm:num_preemptions")
        assert texts(generate(sparse, crowd, 8)) == apart
        assert metric(sparse, "vllm:num_preemptions") > before
    for expected, *actual in zip(dense, together, alone, strict=True):
        for answer in actual:
            assert_close(answer, expected, log_probability_error(family))


def test_small_chunks_prefix_hits_and_reused_blocks(
    family: str, sparse: LLM, dense: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of the test above, which now reads 64 tokens a step."""
    scheduler = sparse.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 64)
    error = log_probability_error(family)
    assert sparse.reset_prefix_cache() or family in STATE
    schedule, most = scheduler.schedule, []

    def noting(*args: Any, **kwargs: Any) -> Any:
        step = schedule(*args, **kwargs)
        most.append(step.total_num_scheduled_tokens)
        return step

    monkeypatch.setattr(scheduler, "schedule", noting)
    for answer, expected in zip(answers(sparse, lengths(family)), dense, strict=True):
        assert_close(answer, expected, error)
    assert max(most) == 64
    if family in STATE:
        return
    assert sparse.reset_prefix_cache()
    (prompt,) = prompts(2, (300,))
    cold = generate(sparse, [prompt], 1, logprobs=20)[0]
    assert cold.num_cached_tokens == 0
    for seed in range(3):
        generate(sparse, prompts(10 + seed, (280, 200, 270)), 1)
        warm = generate(sparse, [prompt], 1, logprobs=20)[0]
        assert warm.num_cached_tokens == 256
        assert_close(first_logprobs(warm), first_logprobs(cold), error)
    assert sparse.reset_prefix_cache()
    for answer, expected in zip(answers(sparse, lengths(family)), dense, strict=True):
        assert_close(answer, expected, error)


FEATURES = {
    "mistral": ({"sliding_window": None},),
    "phi3": ({"sliding_window": None},),
    "gemma2": ({"attn_logit_softcapping": None}, {"sliding_window": 4096}),
    "gemma3_text": ({"sliding_window": 4096},),
    "gemma3n_text": ({"sliding_window": 4096},),
    "gemma4_text": ({"sliding_window": 4096},),
    "gpt_oss": ({"sliding_window": 4096},),
    "cohere2": ({"sliding_window": 4096},),
}


def test_what_sets_a_family_apart_shows_in_its_answers(family: str, model: Path) -> None:
    """Else its test could not fail."""
    if family not in FEATURES:
        pytest.skip("nothing but full attention and state layers")
    (tokens,) = prompts(3, (130,))

    def answer(**changes: Any) -> torch.Tensor:
        plain = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager", **changes
        )
        with torch.inference_mode():
            return plain(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)

    whole = answer()
    for changes in FEATURES[family]:
        assert (answer(**changes) - whole).abs().max() > 0.02, changes


def test_gemma_3_of_seven_layers_fills_uneven_groups(tmp_path: Path) -> None:
    """Six sliding layers and a full one: the full group covers no page of most rings' layers."""
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    path = models.build("gemma3_text", tmp_path, num_hidden_layers=7, layer_types=kinds)
    with start(path, None, dtype="float32") as llm:
        dense = answers(llm)
    with start(path, LOSSLESS, dtype="float32", num_gpu_blocks_override=96) as llm:
        for _ in range(3):
            for answer, expected in zip(answers(llm), dense, strict=True):
                assert_close(answer, expected, 2e-3)
            generate(llm, prompts(4, (200, 124, 90, 300)), 8)
            assert llm.reset_prefix_cache()


def test_skipped_layers_run_beside_sparse_ones(tmp_path: Path) -> None:
    path = models.build("gemma3_text", tmp_path)
    with start(path, None, dtype="float32") as llm:
        dense = answers(llm)
    for skip in ([0, -1], ["full"], ["sliding"]):
        with start(path, LOSSLESS | {"skip_layers": skip}, dtype="float32") as llm:
            for answer, expected in zip(answers(llm), dense, strict=True):
                assert_close(answer, expected, 2e-3)
    lossy = {"key_dtype": "int2", "value_dtype": "int2", "window": 0, "basis": "none"}
    lossy |= {"skip_layers": ["sliding"]}
    with start(path, lossy, dtype="float32", max_num_batched_tokens=64) as llm:
        errors = [
            max(abs(answer[token] - expected[token]) for token in answer.keys() & expected.keys())
            for answer, expected in zip(answers(llm), dense, strict=True)
        ]
    assert max(errors) > 0.02, "nothing is sparse"


def test_a_checkpoint_that_names_a_cache_dtype(tmp_path: Path) -> None:
    """llm-compressor's scheme and scales: the cache is ours, and what it holds is not scaled."""
    path = models.build("llama", tmp_path)
    with start(path, None, dtype="float32") as llm:
        dense = answers(llm)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": scheme | {"symmetric": True},
    }
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    weights = load_file(path / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for kind in "kv":
            name = f"model.layers.{layer}.self_attn.{kind}_scale"
            weights[name] = torch.tensor([0.125])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with start(path, LOSSLESS, dtype="float32") as llm:
        for answer, expected in zip(answers(llm), dense, strict=True):
            assert_close(answer, expected, 2e-3)
