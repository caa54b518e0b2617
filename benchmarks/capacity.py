"""How many tokens the KV cache holds, dense and sparse, as vLLM reports it.

    python benchmarks/capacity.py --model .cache/smollm2-135m-instruct

Each cache is that of a real engine, started without weights for the same memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import machine, save

ROOT = Path(__file__).resolve().parents[1]
CACHES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "50 % auto": {
        "key_sparsity": 0.5,
        "value_sparsity": 0.5,
        "key_dtype": "auto",
        "value_dtype": "auto",
    },
    "50 % fp8": {
        "key_sparsity": 0.5,
        "value_sparsity": 0.5,
        "key_dtype": "fp8",
        "value_dtype": "fp8",
    },
    "quality": {"preset": "quality"},
    "balanced": {"preset": "balanced"},
    "int3 keys and values": {"key_dtype": "int3", "value_dtype": "int3"},
    "int3 keys, int2 values": {"key_dtype": "int3", "value_dtype": "int2"},
    "balanced, first and last two layers dense": {
        "preset": "balanced",
        "skip_layers": [0, 1, -2, -1],
    },
}


def tokens(options: dict[str, Any], settings: dict[str, Any] | None) -> int:
    """KV cache size of an engine in this process, dense without settings."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM

    if settings is not None:
        options |= {"attention_backend": "sparsekv", "additional_config": {"sparsekv": settings}}
    llm = LLM(load_format="dummy", enforce_eager=True, skip_tokenizer_init=True, **options)
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes (default 1 GiB)")
    parser.add_argument("--basis", help="file of sparsekv-calibrate: also caches that need one")
    args = parser.parse_args()
    caches = dict(CACHES)
    if args.basis:
        caches["capacity"] = {"preset": "capacity", "basis": args.basis}
        caches["int4_int2 keys, int3 values"] = {"key_dtype": "int4_int2", "basis": args.basis}
    options = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": args.max_model_len,
        "kv_cache_memory_bytes": args.memory,
    }
    name = Path(args.model).name
    report = {"machine": machine(), "arguments": options | {"model": name}, "tokens": {}}
    spawn = multiprocessing.get_context("spawn")
    for cache, settings in caches.items():
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
            count = pool.submit(tokens, options, settings).result()
        report["tokens"][cache] = count
        print(f"{cache}: {count:,} tokens, {count / report['tokens']['dense']:.2f}x", flush=True)
    output = ROOT / "benchmarks" / "results" / f"capacity_{name}.json"
    save(output, report)


if __name__ == "__main__":
    main()
