"""vLLM serving a Llama-3.1-8B-shaped model with dummy weights: dense, rival and sparse caches.

Each engine runs in a process of its own with the same share of the GPU's memory. Per engine: what
the cache holds, the time to the first token of a lone prompt, decode tokens/s of a batch that
every engine can hold, and of as many requests as its own cache holds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from timing import quantiles

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TINY = LLAMA_8B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ENGINES: dict[str, dict[str, Any]] = {
    "dense": {},
    "dense-triton": {"attention_backend": "TRITON_ATTN"},
    "dense-fp8": {"kv_cache_dtype": "fp8"},
    "turboquant-k8v4": {"kv_cache_dtype": "turboquant_k8v4"},
    "turboquant-4bit": {"kv_cache_dtype": "turboquant_4bit_nc"},
}
"""Arguments of ``LLM``; :func:`engines` adds a sparse one for every preset."""


@dataclass(frozen=True)
class Load:
    """What every engine is asked.

    Attributes:
        context: tokens of a prompt.
        batch: requests at once where all engines get the same.
        steps: decode steps that are timed.
        most: requests at once where the cache is the limit.
    """

    context: int = 8192
    batch: int = 32
    steps: int = 64
    most: int = 1024


def engines() -> dict[str, dict[str, Any]]:
    from vllm_sparsekv.settings import PRESETS

    def sparse(preset: str) -> dict[str, Any]:
        settings = {"sparsekv": {"preset": preset}}
        return {"attention_backend": "sparsekv", "additional_config": settings}

    return ENGINES | {f"sparse-{preset}": sparse(preset) for preset in PRESETS}


def measure_serving(names: list[str], load: Load, dry_run: bool) -> dict[str, Any]:
    """Results by engine; ``error`` in place of figures where an engine does not start."""
    result: dict[str, Any] = {"load": asdict(load), "engines": {}}
    with tempfile.TemporaryDirectory() as folder:
        config = TINY if dry_run else LLAMA_8B
        Path(folder, "config.json").write_text(json.dumps(config))
        # Room for decoding while the last prompts of a full cache are still read.
        room = 2 * load.steps + load.most
        options = {
            "model": folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": load.context + room,
            "max_num_seqs": load.most,
            "seed": 0,
        }
        options |= {"kv_cache_memory_bytes": 1 << 26, "enforce_eager": True} if dry_run else {}
        for name in names:
            print(f"serving, {name}: starting the engine ...", flush=True)
            result["engines"][name] = _in_subprocess(options | engines()[name], load)
            print(json.dumps(result["engines"][name]), flush=True)
    return result


def _in_subprocess(options: dict[str, Any], load: Load) -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(serve, options, load).result()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def serve(options: dict[str, Any], load: Load) -> dict[str, Any]:
    """Run one engine within this process; milliseconds and tokens a second."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_sparsekv.engine.plugin import register

    # The package need not be installed for vLLM to find it.
    register()
    from vllm import LLM

    llm = LLM(**options)
    config = llm.llm_engine.vllm_config
    capacity = config.cache_config.kv_cache_size_tokens
    full = full_batch(capacity, load, config.scheduler_config.max_num_batched_tokens)
    client = _Client(llm, load)
    client.batch(1)
    alone = [client.batch(1)["first_token_ms"] for _ in range(5)]
    return {
        "kv_cache_tokens": capacity,
        "first_token_ms": quantiles(alone),
        "equal_batch": client.batch(load.batch),
        "full_cache": client.batch(full),
    }


def full_batch(capacity: int, load: Load, chunk: int) -> int:
    """Requests that fit a cache of ``capacity`` tokens to the last timed step.

    Args:
        chunk: tokens of a step; while later prompts are read the earlier requests decode.
    """

    def tokens(requests: int) -> float:
        waiting = requests * load.context / chunk
        return requests * (load.context + waiting / 2 + load.steps)

    return max((n for n in range(1, load.most + 1) if tokens(n) <= capacity), default=1)


class _Client:
    """Sends batches of random prompts to an engine in this process."""

    def __init__(self, llm: Any, load: Load) -> None:
        self.engine, self.load = llm.llm_engine, load
        self.vocabulary = range(2, self.engine.model_config.get_vocab_size())
        self.random = random.Random(0)
        self.batches = 0

    def batch(self, requests: int) -> dict[str, Any]:
        """All prompts at once; decode steps count from when the last has its first token."""
        from vllm import SamplingParams

        room = 2 * self.load.steps + self.load.most
        params = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, detokenize=False)
        self.batches += 1
        names = [f"{self.batches}-{index}" for index in range(requests)]
        prompts = [self.random.choices(self.vocabulary, k=self.load.context) for _ in names]
        start = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        waiting = set(names)
        while waiting:
            waiting -= {x.request_id for x in self.engine.step() if x.outputs[0].token_ids}
        first = time.perf_counter() - start
        rates = []
        for _ in range(self.load.steps):
            start = time.perf_counter()
            tokens = sum(bool(x.outputs[0].token_ids) for x in self.engine.step())
            rates.append(tokens / (time.perf_counter() - start))
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {
            "requests": requests,
            "first_token_ms": first * 1e3,
            "decode_tokens_per_s": quantiles(rates),
        }
