"""A model with an audio tower: its tower has no cache, its language model's is sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import LOSSLESS, MODEL, engine, metric, texts
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from vllm import LLM, SamplingParams

from vllm_sparsekv.engine.calibrate import calibrate

pytestmark = pytest.mark.usefixtures("engines_in_process")

RATE = 16_000
OPTIONS = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 1 << 27}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-Audio with the demo model's tokenizer."""
    folder = tmp_path_factory.mktemp("audio")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]}
    )
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "d_model": 64,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": 0.15,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=32), tokenizer).save_pretrained(folder)
    # vLLM knows the names of earlier checkpoints; what is heard is to show in the answer.
    weights = {
        name.replace(".model.model.", ".model."): weight * (1 if name.startswith("language") else 3)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompt(seed: int, words: int) -> dict[str, Any]:
    """A second of noise and a question of some length."""
    noise = np.random.default_rng(seed).standard_normal(RATE).astype(np.float32)
    text = "<|audio_bos|><|AUDIO|><|audio_eos|> What is this?" + " word" * words
    return {"prompt": text, "multi_modal_data": {"audio": (noise, RATE)}}


def answers(llm: LLM) -> list[list[int]]:
    """Of prompts together, alone, and one again with the same sound and with another."""
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    batches = [[prompt(0, 3), prompt(1, 150), prompt(2, 300)], [prompt(1, 150)], [prompt(3, 150)]]
    return [
        answer
        for batch in batches
        for answer in texts(llm.generate(batch, sampling, use_tqdm=False))
    ]


def test_answers_are_the_dense_engine_s(model: Path) -> None:
    found = []
    for settings in (None, LOSSLESS | {"basis": "none"}):
        with engine(settings, model=str(model), max_num_batched_tokens=512, **OPTIONS) as llm:
            found.append(answers(llm))
            assert metric(llm, "vllm:prefix_cache_hits") > 0
    assert found[0] == found[1]
    _, second, _, again, other = found[0]
    assert second == again != other


def test_it_is_calibrated_by_text_of_its_own(model: Path, tmp_path: Path) -> None:
    options = {"model": str(model)} | OPTIONS
    file = calibrate(options, tmp_path / "basis.safetensors", tokens=512, length=64)
    assert dict(file.shapes) == {index: (2, 32) for index in range(3)}
    assert all(file.layer(index).key_mean.any() for index in file.shapes)
