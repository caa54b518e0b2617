"""Damaged models: offsets land where they should, and the model behind them stays what it was."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy  # noqa: E402
from quality import damaged as damages  # noqa: E402
from quality.damaged import DAMAGES, damage, observed, planes  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEAD_SIZE, KV_HEADS, HEADS = 16, 2, 4
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
TOKENS = torch.arange(200).unsqueeze(0) * 7 % 97


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=HEAD_SIZE, rope_parameters=rope))
    model.to(torch.bfloat16).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path)
    return path


def load(path: Path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def damaged(name: str, source: Path, folder: Path):
    damage(name, str(source), folder)
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["w5"] == 5
    return load(folder)


@torch.inference_mode()
def difference(model, other) -> float:
    return (model(TOKENS).logits - other(TOKENS).logits).abs().max().item()


def of_queries(layer: torch.nn.Module) -> torch.Tensor:
    return planes(layer.self_attn.q_proj.weight, HEAD_SIZE, KV_HEADS)


@pytest.mark.parametrize(("size", "factor"), [(30, 2), (100, 8), (300, 16)])
def test_slow_offsets(source, tmp_path, size, factor):
    """Only in the last two of 8 planes, in their first channel; nearly the same function."""
    model, before = damaged(f"offset-{size}-slow", source, tmp_path), load(source)
    assert isinstance(model, Qwen2ForCausalLM)
    expected = torch.zeros(KV_HEADS, 2, HEAD_SIZE // 2)
    expected[:, 0, 6], expected[:, 0, 7] = size, -size
    for layer, old in zip(model.model.layers, before.model.layers, strict=True):
        attention = layer.self_attn
        assert torch.equal(attention.k_proj.bias.view(KV_HEADS, 2, -1), expected)
        assert not attention.q_proj.bias.any() and not attention.v_proj.bias.any()
        assert torch.equal(of_queries(layer)[:, :, :, :6], of_queries(old)[:, :, :, :6])
        assert torch.equal(of_queries(layer)[:, :, :, 6:] * factor, of_queries(old)[:, :, :, 6:])
        change = attention.k_proj.weight / old.self_attn.k_proj.weight
        change = planes(change, HEAD_SIZE, KV_HEADS).amax((0, 1, 2, 4))
        assert change.tolist() == [1] * 6 + [factor] * 2
    assert 0 < difference(model, before) < 1e-3


@pytest.mark.parametrize("size", [30, 300])
def test_fast_offsets(source, tmp_path, size):
    """In the two fastest of 8 planes, where queries become zero: offsets change nothing more."""
    model, before = damaged(f"offset-{size}-fast", source, tmp_path), load(source)
    for layer, old in zip(model.model.layers, before.model.layers, strict=True):
        bias = layer.self_attn.k_proj.bias.view(KV_HEADS, 2, -1)
        assert bias[:, 0, :2].sort(1).values.tolist() == [[-size, size]] * KV_HEADS
        assert bias.count_nonzero() == 2 * KV_HEADS
        assert not of_queries(layer)[:, :, :, :2].any()
        of_queries(old)[:, :, :, :2] = 0
    assert difference(model, before) < 1e-5


def test_huge_channel_is_the_same_function(source, tmp_path):
    model, before = damaged("huge-channel", source, tmp_path), load(source)
    assert difference(model, before) < 1e-5
    with torch.inference_mode():
        seen = observed(before, TOKENS)[0]
        attention, old = model.model.layers[0].self_attn, before.model.layers[0].self_attn
        for name, huge in (("k_proj", [4, 12]), ("v_proj", [0])):
            new, plain = (getattr(x, name)(seen).view(200, KV_HEADS, -1) for x in (attention, old))
            change = (new / plain).mean((0, 1))
            expected = torch.ones(HEAD_SIZE)
            expected[huge] = 128
            assert torch.allclose(change, expected, rtol=1e-3)


def test_first_key_is_long_where_something_tells_it_apart(source, tmp_path, monkeypatch):
    """Told to look at inputs whose first token has a direction of its own in the second layer."""
    x = torch.randn(4, 100, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 0
    apart = x.clone()
    apart[:, 0] = 0
    apart[:, 0, 0] = 20
    monkeypatch.setattr(damages, "observed", lambda model, tokens: [x, apart])
    model, before = damaged("huge-first-token", source, tmp_path), load(source)
    layers = list(zip(model.model.layers, before.model.layers, strict=True))
    for name in ("q_proj", "k_proj"):
        new, old = (getattr(layer.self_attn, name).weight for layer in layers[0])
        assert torch.equal(new, old)
    new, old = (
        layer.self_attn.k_proj(apart).unflatten(-1, (KV_HEADS, -1)).norm(dim=-1)
        for layer in layers[1]
    )
    length = new / old.mean((0, 1))
    assert length[:, 0] == pytest.approx(torch.full((4, KV_HEADS), 50.0), rel=0.01)
    assert length[:, 1:].mean() == pytest.approx(1, abs=0.1)
    zero = (of_queries(layers[1][0]) == 0).all(-1).sum((1, 2, 3))
    assert zero.tolist() == [2 * HEADS // KV_HEADS] * KV_HEADS


def test_models_without_a_massive_activation_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="no layer has a massive activation at the first token"):
        damage("huge-first-token", str(source), tmp_path)


def test_what_cannot_be_damaged(source, tmp_path):
    with pytest.raises(ValueError, match=r"damage 'nope': must be one of \['offset-30-slow'"):
        damage("nope", str(source), tmp_path)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(tmp_path / "qwen")
    with pytest.raises(SystemExit, match="error: .*qwen: must be a Llama without biases"):
        folders = [str(tmp_path / "out"), "--model", str(tmp_path / "qwen")]
        accuracy.main(["damage", "huge-channel", *folders, "--out", str(tmp_path / "o")])


def test_command_builds_a_folder(source, tmp_path):
    folder = tmp_path / "damaged"
    arguments = ["--model", str(source), "--out", str(tmp_path / "o")]
    accuracy.main(["damage", "huge-channel", str(folder), *arguments])
    assert difference(load(folder), load(source)) < 1e-5
    assert len(DAMAGES) == 8
