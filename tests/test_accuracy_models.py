"""The evaluator beyond Llama: its dense cache is the model itself, and texts start as they must."""

from __future__ import annotations

import sys
from pathlib import Path

import models
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vllm_sparsekv.settings import SparseKVConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality import tasks  # noqa: E402
from quality.attention import RuleModel, rule_attention  # noqa: E402
from quality.methods import DENSE, Shape, sparse  # noqa: E402
from quality.perplexity import token_samples  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOKENS = torch.arange(700) * 7 % models.VOCABULARY
FAMILIES = (
    "mistral",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "cohere2",
    "granite",
    "qwen3_next",
    "granitemoehybrid",
)


@torch.inference_mode()
def eager_logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(TOKENS.unsqueeze(0)).logits[0]


def assert_dense_rule_is_the_model(path: Path) -> None:
    model = RuleModel(str(path), torch.float32)
    expected = eager_logits(path)
    assert expected.std() > 0.05
    assert (model.logits(model.hidden(TOKENS, DENSE)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_rule_is_the_model_itself(family, tmp_path):
    assert_dense_rule_is_the_model(models.build(family, tmp_path))


def test_head_size_256_with_one_kv_head(tmp_path):
    """As Gemma-3-270M, in which a window is shorter than the text too."""
    shape = {"head_dim": 256, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
    path = models.build("gemma3_text", tmp_path, **shape)
    assert_dense_rule_is_the_model(path)
    assert RuleModel(str(path)).shape == Shape(head_size=256, num_kv_heads=1, num_layers=6)


def test_rule_with_everything_is_softmax_over_what_a_query_sees():
    """A sliding window, a soft cap and sinks at once, cached before a dense window of 8."""
    window, cap, tokens = 30, 2.0, 150
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 4, tokens, 32, generator=generator).unbind()
    key, value = key[:2], value[:2]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    method = sparse(SparseKVConfig(0.5, 0.5, "fp8", "fp8", 8, "auto", "none"), 32, torch.float32)
    arguments = (method, torch.float32, 0.3, 1, window, cap, sinks)
    out = rule_attention(query, key, value, *arguments)
    cached_key, cached_value = method.key(key, query), method.value(value)
    for head in range(4):
        for t in (0, 1, 7, 29, 30, 63, 64, 149):
            seen = range(max(0, t - window + 1), t + 1)
            dense = torch.tensor([j >= t - 8 for j in seen]).unsqueeze(1)
            keys, values = (
                torch.where(dense, exact[head // 2, seen], cached[head // 2, seen])
                for exact, cached in ((key, cached_key), (value, cached_value))
            )
            scores = cap * (keys @ query[head, t] * 0.3 / cap).tanh()
            weights = torch.cat([scores, sinks[head : head + 1]]).softmax(0)[:-1]
            assert (out[head, t] - weights @ values).abs().max() < 1e-5


def tokenizer(starts: bool) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    if starts:
        words.post_processor = TemplateProcessing("w2 $A", special_tokens=[("w2", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_samples_start_as_the_tokenizer_starts_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(10, 40)))
    samples = token_samples(tokenizer(True), path, 6, 9, 4)
    assert samples.tolist() == [[2, *range(i, i + 8)] for i in (10, 18, 26)]
    samples = token_samples(tokenizer(False), path, 6, 9, 4)
    assert samples.tolist() == [list(range(i, i + 9)) for i in (10, 19, 28)]


def test_passkey_prompts_start_as_the_tokenizer_starts_a_text():
    for starts in (True, False):
        prompt, _ = tasks.passkey_prompt(tokenizer(starts), 300, 0.5, seed=0)
        assert (prompt[0] == 2) == starts and prompt.count(2) == starts
        assert 260 < len(prompt) <= 300
