"""The engine route: perplexity through vLLM in steps of :data:`CHUNK` prompt tokens."""

from __future__ import annotations

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from quality.attention import RuleModel
from quality.methods import DENSE, Method, as_served, sparse
from vllm_sparsekv.settings import SparseKVConfig

CHUNK = 64


def engine_nll(
    model: str, samples: dict[str, list[int]], settings: dict[str, Any] | None, dtype: str
) -> dict[str, float]:
    """Mean negative log-probability of each sample through vLLM; dense where settings is None."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    sparse_options = {
        "attention_backend": "sparsekv",
        "additional_config": {"sparsekv": settings},
    }
    llm = LLM(
        model,
        dtype=dtype,
        max_model_len=max(map(len, samples.values())) + 1,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 29,
        enforce_eager=True,
        **(sparse_options if settings is not None else {}),
    )
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    result = {}
    try:
        for name, tokens in samples.items():
            output = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]
            entries = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
            logprobs = [entry[token].logprob for token, entry in entries]
            result[name] = -sum(logprobs) / len(logprobs)
            print(f"engine {'dense' if settings is None else settings}: {name} done", flush=True)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return result


def torch_nll(model: RuleModel, tokens: torch.Tensor, method: Method) -> float:
    """The same figure from the torch route in equal steps."""
    logprobs = model.logits(model.hidden(tokens, method, CHUNK)[:-1]).log_softmax(-1)
    return -logprobs.gather(1, tokens[1:, None]).double().mean().item()


def compare_routes(
    path: str, samples: dict[str, torch.Tensor], settings: dict[str, Any], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Perplexities and their ratio to dense from both routes, one row per text.

    Raises:
        ValueError: invalid settings.
    """
    config = SparseKVConfig.from_dict(settings)
    model = RuleModel(path, dtype)
    method = sparse(as_served(config, model.head_size, dtype), model.head_size, dtype)
    lists = {name: tokens.tolist() for name, tokens in samples.items()}
    name = str(dtype).removeprefix("torch.")
    dense, tested = (
        _in_process(engine_nll, path, lists, given, name) for given in (None, settings)
    )
    rows = []
    for text, tokens in samples.items():
        ours, ours_dense = (torch_nll(model, tokens, m) for m in (method, DENSE))
        row = {
            "text": text,
            "tokens": len(tokens),
            "settings": method.settings,
            "engine_ppl": math.exp(tested[text]),
            "torch_ppl": math.exp(ours),
            "engine_ratio": math.exp(tested[text] - dense[text]),
            "torch_ratio": math.exp(ours - ours_dense),
        }
        print(f"{text}: engine ratio {row['engine_ratio']:.5f}, torch {row['torch_ratio']:.5f}")
        rows.append(row)
    return rows


def _in_process(function, *args: Any) -> Any:
    """An engine's memory is free again only when its process has ended."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()
