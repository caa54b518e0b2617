"""vLLM's offline engine, as calibration runs it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from vllm.config import ModelConfig
from vllm.platforms import current_platform

from vllm_sparsekv.engine.compat.config import weight_bytes


@contextmanager
def offline_engine(options: dict[str, Any]) -> Iterator[Any]:
    """vLLM's ``LLM``, shut down at the end."""
    from vllm import LLM

    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def model_config(options: dict[str, Any]) -> ModelConfig:
    """Of the engine with these of vLLM's options."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(**options).create_model_config()


def emulates_dtype(config: ModelConfig) -> bool:
    """Whether this CPU has no arithmetic in the model's 16 bits, and memory for it in 32.

    Such a model answers several times faster in float32, and no worse.
    """
    # vLLM's state layers have CPU kernels for some dtypes only.
    if not current_platform.is_cpu() or config.quantization is not None or config.is_hybrid:
        return False
    native = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(config.dtype)
    size = weight_bytes(config)
    if native is None or native() or size is None:
        return False
    # The weights twice, in 16 bits as they are read and in 32, and as much again for all else.
    return psutil.virtual_memory().available > 6 * size


def first_token(llm: Any, seed: int) -> int:
    """What a text begins with: the model's own token for that, else any."""
    config = llm.llm_engine.vllm_config.model_config.hf_text_config
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(config, name, None)
        token = token[0] if isinstance(token, list) else token
        if token is not None:
            return token
    return random.Random(seed).randrange(config.vocab_size)


def write_tokens(llm: Any, first: list[int], length: int) -> list[list[int]]:
    """Have the model write, ``length`` tokens after and with each of these."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [token]} for token in first]
    sampling = [
        SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=length - 1,
            ignore_eos=True,
            detokenize=False,
        )
        for seed in range(len(first))
    ]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        [token, *output.outputs[0].token_ids] for token, output in zip(first, outputs, strict=True)
    ]


def read_prompts(llm: Any, prompts: list[list[int]]) -> None:
    """Run prompts through the model and take one token each."""
    from vllm import SamplingParams

    llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=1, detokenize=False),
        use_tqdm=False,
    )
