"""A tiny target model and drafters made of its own layers, so that many of their tokens are taken.

Embeddings have unit size and all layers but the first say little, so a drafter with the target's
first layer guesses well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]
TOKENS = 3
"""Drafted in a step."""


def target(folder: Path, family: str = "llama") -> Path:
    """Write the target, with a multi-token predictor in its folder where the family has one."""
    models.build(family, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    # The one of the padding token is 0.
    embedding *= embedding.pow(2).mean(1, keepdim=True).clamp(min=1e-9).rsqrt()
    for name, weight in weights.items():
        if ("o_proj" in name or "down_proj" in name) and ".layers.0." not in name:
            weight *= 0.15
    if family == "ernie4_5_moe":
        weights |= _predictor(weights)
    _save(folder, weights)
    return folder


def _predictor(weights: Weights) -> Weights:
    size = weights["model.norm.weight"].numel()
    block = {
        name.replace(".layers.0.", ".mtp_block.0."): weight.clone()
        for name, weight in weights.items()
        if ".layers.0." in name
    }
    return block | {
        "model.mtp_emb_norm.0.weight": torch.ones(size),
        "model.mtp_hidden_norm.0.weight": torch.ones(size),
        "model.mtp_linear_proj.0.weight": _first_of(2, size),
    }


def draft_model(target: Path, folder: Path) -> Path:
    """The target without its last two layers."""
    weights = load_file(target / "model.safetensors")
    kept = {k: v for k, v in weights.items() if ".layers.2." not in k and ".layers.3." not in k}
    return _write(target, folder, kept, num_hidden_layers=2)


def eagle(target: Path, folder: Path) -> Path:
    """EAGLE's head: the target's first layer, looking at embeddings alone."""
    weights = load_file(target / "model.safetensors")
    head = {k.removeprefix("model."): v for k, v in weights.items() if ".layers.0." in k}
    del head["layers.0.input_layernorm.weight"]  # which EAGLE has not
    head["fc.weight"] = _first_of(2, weights["model.norm.weight"].numel())
    return _write(
        target, folder, head, num_hidden_layers=1, architectures=["EagleLlamaForCausalLM"]
    )


def eagle3(target: Path, folder: Path) -> Path:
    """EAGLE-3's head: the target's first layer, which sees embeddings and no hidden states."""
    weights = load_file(target / "model.safetensors")
    size = weights["model.norm.weight"].numel()
    head = {
        k.replace("model.layers.0.", "midlayer."): v
        for k, v in weights.items()
        if ".layers.0." in k
    }
    for projection in ("q_proj", "k_proj", "v_proj"):
        name = f"midlayer.self_attn.{projection}.weight"
        head[name] = torch.cat([head[name], torch.zeros_like(head[name])], 1)
    head |= {
        "midlayer.hidden_norm.weight": torch.ones(size),
        "fc.weight": _first_of(3, size),
        "norm.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
        "embed_tokens.weight": weights["model.embed_tokens.weight"],
    }
    return _write(
        target,
        folder,
        head,
        num_hidden_layers=1,
        architectures=["LlamaForCausalLMEagle3"],
        eagle_aux_hidden_state_layer_ids=[1, 2, 3],
    )


def _first_of(parts: int, size: int) -> torch.Tensor:
    """A projection of several vectors side by side to the first of them."""
    return torch.cat([torch.eye(size), *[torch.zeros(size, size)] * (parts - 1)], 1)


def _write(target: Path, folder: Path, weights: Weights, **changes: Any) -> Path:
    config = json.loads((target / "config.json").read_text())
    config.pop("layer_types", None)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    _save(folder, weights)
    return folder


def _save(folder: Path, weights: Weights) -> None:
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
