"""Decode and prompt speed, KV capacity: the engine with sparse pages against the dense engine.

    python benchmarks/engine.py [--context 1024] [--batch 8] [--rounds 2] [--dtype float32]
    python benchmarks/engine.py --context 4096 7680 --batch 4 --rounds 1 --output long.json

Both engines run one after the other in processes of their own, with the same cache memory. A round
is one batch of fresh prompts: the time until each of them has its first token, then decode steps of
the whole batch. Medians, p20 and p80 over rounds and steps, the ratios and the machine go to
``benchmarks/results/engine.json``.
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

from common import machine, save, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DECODE_STEPS = 24
MAX_TOKENS = 512
"""Room for requests that decode while later prompts are still being read."""


def measure(options: dict[str, Any], contexts: list[int], batch: int, rounds: int) -> dict:
    """Run one engine; seconds and rates per context length."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(enforce_eager=True, enable_prefix_caching=False, **options)
    cache = llm.llm_engine.vllm_config.cache_config
    result: dict[str, Any] = {"kv_cache_tokens": cache.kv_cache_size_tokens}
    one_round(llm, min(contexts), batch, seed=0)  # warms up
    for context in contexts:
        prompt_seconds, decode_rate = [], []
        for index in range(1, rounds + 1):
            prompt, steps = one_round(llm, context, batch, seed=index)
            print(f"  context {context}, round {index}: prompts {prompt:.2f} s", flush=True)
            prompt_seconds.append(prompt)
            decode_rate += [batch / step for step in steps]
        result[str(context)] = {
            "prompt_seconds": summary(prompt_seconds),
            "decode_tokens_per_second": summary(decode_rate),
        }
    llm.llm_engine.engine_core.shutdown()
    return result


def one_round(llm: Any, context: int, batch: int, seed: int) -> tuple[float, list[float]]:
    """Seconds until every request has its first token, then seconds of each decode step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    generator = random.Random(seed)
    vocabulary = range(1000, llm.llm_engine.model_config.get_vocab_size())
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    names = [f"{context}-{seed}-{index}" for index in range(batch)]
    start = time.perf_counter()
    for name in names:
        prompt = {"prompt_token_ids": generator.choices(vocabulary, k=context)}
        engine.add_request(name, prompt, params)
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    prompt_seconds = time.perf_counter() - start
    steps = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return prompt_seconds, steps


def in_subprocess(*args: Any) -> dict:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(measure, *args).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"))
    parser.add_argument("--context", type=int, nargs="+", default=[1024])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", type=json.loads, default={"preset": "balanced"})
    parser.add_argument("--output", type=Path, default=RESULTS / "engine.json")
    args = parser.parse_args()

    common = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": max(args.context) + MAX_TOKENS,
        "kv_cache_memory_bytes": 1 << 31,
    }
    sparse = {"attention_backend": "sparsekv", "additional_config": {"sparsekv": args.settings}}
    arguments = {name: value for name, value in vars(args).items() if name != "output"}
    arguments["model"] = Path(args.model).name
    report: dict[str, Any] = {"machine": machine(), "arguments": arguments}
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
    save(args.output, report)


if __name__ == "__main__":
    main()
