"""Tiny random models of the families people serve, written as Hugging Face folders by the tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 256
SLIDING = 40
"""Window of sliding layers; a block has 64 tokens."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FIVE_TO_ONE = ["sliding_attention"] * 5 + ["full_attention"]
_SHARING = {
    "num_hidden_layers": 6,
    "sliding_window": SLIDING,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 3,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
_MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING},
    "phi3": {"sliding_window": SLIDING, "rope_scaling": None},
    "gemma2": {
        "sliding_window": SLIDING,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window": SLIDING,
        "layer_types": _FIVE_TO_ONE,
        "query_pre_attn_scalar": 32,
    },
    "gemma3n_text": {
        **_SHARING,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
    },
    "gemma4_text": {**_SHARING, "global_head_dim": 64, "num_global_key_value_heads": 1},
    "gpt_oss": {
        "sliding_window": SLIDING,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "cohere2": {
        "sliding_window": SLIDING,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "granite": {"attention_multiplier": 0.2},
    "ernie4_5_moe": {
        "moe_layer_start_index": 4,
        "moe_num_experts": 2,
        "num_nextn_predict_layers": 1,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "granitemoehybrid": {
        "hidden_size": 128,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        **_MAMBA,
    },
    "jamba": {
        "hidden_size": 128,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 8,
        **_MAMBA,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": 3,
        "conv_dim": 128,
        "block_dim": 128,
        "hidden_size": 128,
    },
}
"""Configuration by Hugging Face model type."""


def prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    """Of random tokens."""
    generator = random.Random(seed)
    return [[generator.randrange(3, VOCABULARY) for _ in range(n)] for n in lengths]


def build(family: str, folder: Path, **changes: Any) -> Path:
    """Write a model of a family, float32, the same each time, its configuration with ``changes``.

    Weights are large enough that what a head looks at shows in the answer.
    """
    config = AutoConfig.for_model(family, **_SHAPE | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder
