"""Decode and prompt speed, KV capacity: the engine with sparse pages against the dense engine.

    python benchmarks/engine.py [--context 1024 4096] [--batch 8] [--dtype float32]

Both engines run one after the other in processes of their own, with the same cache memory. A round
is one batch of fresh prompts; prompt time is the time to the first token of the whole batch, decode
speed counts the tokens after it. The medians over rounds, p20 and p80, the ratio and the machine go
to ``benchmarks/results/engine.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import machine, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NEW_TOKENS = 33


def measure(options: dict[str, Any], contexts: list[int], batch: int, rounds: int) -> dict:
    """Run one engine; seconds and rates per context length."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(enforce_eager=True, enable_prefix_caching=False, **options)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    more = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    result: dict[str, Any] = {
        "kv_cache_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    }
    generator = random.Random(0)
    for context in contexts:
        prompt_seconds, decode_rate = [], []
        for index in range(rounds + 1):
            prompts = [
                {"prompt_token_ids": generator.choices(range(1000, vocabulary), k=context)}
                for _ in range(batch)
            ]
            start = time.perf_counter()
            llm.generate(prompts, first, use_tqdm=False)
            prompt = time.perf_counter() - start
            start = time.perf_counter()
            llm.generate(prompts, more, use_tqdm=False)
            decode = time.perf_counter() - start - prompt
            print(f"  context {context}, round {index}: {prompt:.2f} s, {decode:.2f} s", flush=True)
            if index:  # the first round warms up
                prompt_seconds.append(prompt)
                decode_rate.append(batch * (NEW_TOKENS - 1) / decode)
        result[str(context)] = {
            "prompt_seconds": summary(prompt_seconds),
            "decode_tokens_per_second": summary(decode_rate),
        }
    llm.llm_engine.engine_core.shutdown()
    return result


def in_subprocess(*args: Any) -> dict:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(measure, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"))
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", type=json.loads, default={"preset": "balanced"})
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()

    common = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": max(args.context) + 64,
        "kv_cache_memory_bytes": 1 << 31,
    }
    sparse = {"attention_backend": "sparsekv", "additional_config": {"sparsekv": args.settings}}
    report: dict[str, Any] = {"machine": machine(), "arguments": vars(args) | {"output": ""}}
    for name, extra in {"dense": {}, "sparse": sparse}.items():
        print(f"{name}: starting the engine ...", flush=True)
        report[name] = in_subprocess(common | extra, args.context, args.batch, args.rounds)
    report["kernels"] = os.environ.get("SPARSEKV_KERNELS", "chosen by device")

    dense, sparse = report["dense"], report["sparse"]
    report["ratio"] = {"kv_cache_tokens": sparse["kv_cache_tokens"] / dense["kv_cache_tokens"]}
    for context in map(str, args.context):
        speed = [r[context]["decode_tokens_per_second"]["median"] for r in (dense, sparse)]
        prompt = [r[context]["prompt_seconds"]["median"] for r in (dense, sparse)]
        report["ratio"][context] = {"decode": speed[1] / speed[0], "prompt": prompt[0] / prompt[1]}
        print(
            f"context {context}: decode {speed[0]:.1f} -> {speed[1]:.1f} tokens/s "
            f"({speed[1] / speed[0]:.2f}x), prompt {prompt[0]:.2f} -> {prompt[1]:.2f} s"
        )
    print(f"capacity {dense['kv_cache_tokens']:,} -> {sparse['kv_cache_tokens']:,} tokens")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
