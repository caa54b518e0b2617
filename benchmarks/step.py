"""Engine steps, dense against sparse: decode over batch and context, and the time to a first token.

    python benchmarks/step.py [--model FOLDER] [--dtype bfloat16] [--settings JSON] [--output FILE]

Both engines live in this process, on all of its cores, and take turns step by step, so that both
meet the same disturbances. A figure is the median of the ratios of neighbouring steps, with p20 and
p80. Prompts are random tokens, read in vLLM's default chunks. Results go to
``benchmarks/results/step_<model>_<dtype>.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, run_engines_here, save, summary

from vllm_sparsekv.kernels.cpu import build, ops

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LONGEST = 8192
DECODES = [(b, c) for c in (128, 512, 1024, 2048, 4096, 7680) for b in (1, 4, 8, 32)]
"""(batch, context); those of more than ``MAX_TOKENS`` tokens in all are left out."""
MAX_TOKENS = 32 * 1024
PROMPTS = {512: 8, 2048: 4, 7680: 2}
"""Tokens of a single prompt, and rounds."""
STEPS = 32


class Engine:
    """One engine and its requests."""

    def __init__(self, **options: Any) -> None:
        from vllm import LLM

        self.engine = LLM(enable_prefix_caching=False, enforce_eager=True, **options).llm_engine
        self.vocabulary = range(1000, self.engine.model_config.get_vocab_size())
        self.names: list[str] = []

    @property
    def kv_cache_tokens(self) -> int:
        return self.engine.vllm_config.cache_config.kv_cache_size_tokens

    def start(self, batch: int, context: int, seed: int) -> float:
        """Seconds until each of ``batch`` new requests has its first token."""
        from vllm import SamplingParams

        generator = random.Random(seed)
        params = SamplingParams(temperature=0, max_tokens=LONGEST - context, ignore_eos=True)
        prompts = [generator.choices(self.vocabulary, k=context) for _ in range(batch)]
        self.names = [f"{seed}-{batch}-{context}-{index}" for index in range(batch)]
        start = time.perf_counter()
        for name, tokens in zip(self.names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": tokens}, params)
        waiting = set(self.names)
        while waiting:
            outputs = self.engine.step()
            waiting -= {output.request_id for output in outputs if output.outputs[0].token_ids}
        return time.perf_counter() - start

    def step(self) -> float:
        """Seconds of one step of the running requests."""
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start

    def stop(self) -> None:
        self.engine.abort_request(self.names)
        while self.engine.has_unfinished_requests():
            self.engine.step()


def in_turns(dense: list[float], sparse: list[float]) -> dict[str, Any]:
    """Summaries of times in seconds that were taken in turns."""
    ratios = [a / b for a, b in zip(dense, sparse, strict=True)]
    return {
        "dense_ms": summary([1e3 * x for x in dense]),
        "sparse_ms": summary([1e3 * x for x in sparse]),
        "ratio": summary(ratios),
    }


def decode(engines: list[Engine], batch: int, context: int, seed: int) -> dict[str, Any]:
    """Steps of both engines with the same requests."""
    for engine in engines:
        engine.start(batch, context, seed)
    times: list[list[float]] = [[], []]
    for round in range(STEPS):
        for index in (0, 1) if round % 2 else (1, 0):
            times[index].append(engines[index].step())
    for engine in engines:
        engine.stop()
    return in_turns(*times)


def first_token(engines: list[Engine], context: int, rounds: int) -> dict[str, Any]:
    """Time to the first token of a single prompt."""
    times: list[list[float]] = [[], []]
    for round in range(rounds):
        for index in (0, 1) if round % 2 else (1, 0):
            times[index].append(engines[index].start(1, context, seed=round))
            engines[index].stop()
    return in_turns(*times)


def limit_to_avx2() -> None:
    """Have torch, vLLM and our kernels do as on a machine that has no more than AVX2.

    To be called before any of them computes and before vLLM is imported.

    Raises:
        RuntimeError: it was too late.
    """
    os.environ |= {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }
    for name in ("avx512", "avx512_bf16", "vnni", "amx_tile", "amx_fp16"):
        setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    isas = [isa for isa in build.supported_isas() if isa in ("avx2", "portable")]
    build.supported_isas = ops.supported_isas = lambda: isas
    if (capability := torch.backends.cpu.get_cpu_capability()) != "AVX2":
        raise RuntimeError(f"torch computes with {capability} already")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--settings", type=json.loads, default={})
    parser.add_argument("--decode", type=cell, nargs="*", default=DECODES, metavar="BATCHxCONTEXT")
    parser.add_argument("--prompt", type=int, nargs="*", default=list(PROMPTS), metavar="TOKENS")
    parser.add_argument("--avx2", action="store_true", help="use no instructions beyond AVX2")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model = Path(args.model).name
    output = args.output or RESULTS / f"step_{model}_{args.dtype}.json"

    run_engines_here()
    if args.avx2:
        limit_to_avx2()
    common = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": LONGEST,
        "kv_cache_memory_bytes": 3 << 30,
        "async_scheduling": False,
    }
    sparse = {"attention_backend": "sparsekv", "additional_config": {"sparsekv": args.settings}}
    engines = [Engine(**common), Engine(**common, **sparse)]
    tokens = [engine.kv_cache_tokens for engine in engines]
    report: dict[str, Any] = {
        "machine": machine(),
        "arguments": {
            "model": model,
            "dtype": args.dtype,
            "settings": args.settings,
            "avx2": args.avx2,
        },
        "kv_cache_tokens": {"dense": tokens[0], "sparse": tokens[1]},
        "decode": {},
        "first_token": {},
    }
    decode(engines, 1, 128, seed=0)  # warms up
    print(f"{'':>16}{'dense':>12}{'sparse':>12}{'ratio':>8}")
    for seed, (batch, context) in enumerate(args.decode, start=1):
        if batch * context <= MAX_TOKENS:
            name = f"{batch} x {context}"
            report["decode"][name] = found = decode(engines, batch, context, seed)
            show(f"decode {name}", found)
            save(output, report)  # after every row: runs are long
    for context in args.prompt:
        found = first_token(engines, context, PROMPTS.get(context, 2))
        report["first_token"][str(context)] = found
        show(f"prompt {context}", found)
        save(output, report)


def cell(text: str) -> tuple[int, int]:
    batch, _, context = text.partition("x")
    return int(batch), int(context)


def show(name: str, found: dict[str, Any]) -> None:
    dense, sparse = found["dense_ms"]["median"], found["sparse_ms"]["median"]
    print(
        f"{name:>16}{dense:>9.1f} ms{sparse:>9.1f} ms{found['ratio']['median']:>7.2f}x", flush=True
    )


if __name__ == "__main__":
    main()
