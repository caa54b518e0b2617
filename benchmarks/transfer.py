"""Prompts read from files against prompts computed, and what keeping every page costs.

    python benchmarks/transfer.py [--model FOLDER] [--tokens 2048] [--rounds 4] [--output FILE]

A process computes prompts of so many tokens and one more, and keeps their pages in files. In
another that starts when it has ended, an engine over these files, and one without a connector in a
third, take turns: a kept prompt, a new prompt in either, and decode steps in either. Milliseconds
are medians with p20 and p80, ratios those of neighbours. Results go to
``benchmarks/results/transfer.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import machine, run_engines_here, save, summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SETTINGS = {"preset": "balanced", "basis": "none"}
STEPS = 8
"""Of decode, a round."""


class Engine:
    """One engine that has one request at a time."""

    def __init__(self, options: dict[str, Any], folder: Path | None = None) -> None:
        from vllm import LLM

        if folder is not None:
            extra = {
                "cpu_bytes_to_use": 2**28,
                "secondary_tiers": [{"type": "fs", "root_dir": str(folder)}],
            }
            options = options | {
                "kv_transfer_config": {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": extra,
                }
            }
        self.llm = LLM(
            attention_backend="sparsekv", enforce_eager=True, disable_log_stats=False, **options
        )
        self.engine = self.llm.llm_engine
        self.vocabulary = range(1000, self.engine.model_config.get_vocab_size())

    def kept_bytes(self) -> int:
        """Of the pages kept so far, as vLLM counts them."""
        found = (m for m in self.llm.get_metrics() if m.name == "vllm:kv_offload_store_bytes")
        return sum(int(m.value) for m in found)

    def start(self, tokens: int, seed: int) -> tuple[float, int]:
        """Seconds until the prompt of this seed has its first token, and how many were cached."""
        from vllm import SamplingParams

        prompt = random.Random(seed).choices(self.vocabulary, k=tokens + 1)
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        start = time.perf_counter()
        self.engine.add_request(str(seed), {"prompt_token_ids": prompt}, params)
        while not (outputs := self.engine.step()) or not outputs[0].outputs[0].token_ids:
            pass
        return time.perf_counter() - start, outputs[0].num_cached_tokens

    def step(self) -> float:
        """Seconds of one step of the request."""
        start = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - start

    def stop(self, seed: int) -> None:
        """Forget the request, once its pages are on their way."""
        self.engine.abort_request([str(seed)])
        core = self.engine.engine_core.engine_core
        while core.scheduler.has_requests():
            core.step_fn()


class Process:
    """An engine in a process of its own, as vLLM has one connector a process."""

    def __init__(self, options: dict[str, Any], folder: Path | None = None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, _start, (options, folder))

    def __call__(self, name: str, *args: Any) -> Any:
        """What a method of the engine returns."""
        return self._pool.submit(_call, name, *args).result()

    def end(self) -> None:
        self._pool.submit(_shutdown).result()
        self._pool.shutdown()


def _start(options: dict[str, Any], folder: Path | None) -> None:
    global engine
    engine = Engine(options, folder)


def _call(name: str, *args: Any) -> Any:
    return getattr(engine, name)(*args)


def _shutdown() -> None:
    engine.engine.engine_core.shutdown()


def keep(options: dict[str, Any], folder: Path, tokens: int, rounds: int) -> int:
    """Compute prompts and keep them; bytes of their pages."""
    keeping = Process(options, folder)
    for seed in range(rounds):
        keeping("start", tokens, seed)
        for _ in range(STEPS):  # vLLM counts in steps
            keeping("step")
        keeping("stop", seed)
    kept = keeping("kept_bytes")
    keeping.end()
    return kept


def measure(options: dict[str, Any], folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Times in seconds by what was done, a list over rounds or steps each."""
    keeping, plain = Process(options, folder), Process(options)
    times: dict[str, list[float]] = {
        name: [] for name in ("restored", "computed", "plain", "step", "plain_step")
    }

    def start(name: str, process: Process, seed: int, cached: int) -> None:
        seconds, found = process("start", tokens, seed)
        assert found == cached, f"{name}: {found} of {tokens} tokens were cached"
        times[name].append(seconds)

    for process in (keeping, plain):  # what is done once
        process("start", tokens, 2 * rounds)
        process("stop", 2 * rounds)
    for seed in range(rounds):
        start("restored", keeping, seed, tokens)
        keeping("stop", seed)
        new = rounds + seed
        pair = [("computed", keeping), ("plain", plain)]
        for name, process in pair if seed % 2 else pair[::-1]:
            start(name, process, new, 0)
        for _ in range(STEPS):
            times["step"].append(keeping("step"))
            times["plain_step"].append(plain("step"))
        for process in (keeping, plain):
            process("stop", new)
        shown = (f"{name} {seconds[-1]:.3f} s" for name, seconds in times.items())
        print(f"round {seed}:", ", ".join(shown), flush=True)
    for process in (keeping, plain):
        process.end()
    return times


def compare(times: dict[str, list[float]], name: str, other: str) -> dict[str, Any]:
    """Both in milliseconds, and the first over the second in the same turn."""
    pairs = zip(times[name], times[other], strict=True)
    return {
        f"{name}_ms": summary([1e3 * x for x in times[name]]),
        f"{other}_ms": summary([1e3 * x for x in times[other]]),
        "ratio": summary([a / b for a, b in pairs]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2-135m-instruct"))
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of the block size")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--settings", type=json.loads, default=SETTINGS)
    parser.add_argument("--output", type=Path, default=RESULTS / "transfer.json")
    args = parser.parse_args()
    run_engines_here()
    options = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": 2 * args.tokens,
        "max_num_batched_tokens": args.tokens,
        "kv_cache_memory_bytes": 2**28,
        "additional_config": {"sparsekv": args.settings},
    }
    arguments = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"machine": machine(), "arguments": arguments | {"model": Path(args.model).name}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pages = keep(options, folder, args.tokens, args.rounds)
        files = [path.stat().st_size for path in folder.rglob("*.bin")]
        times = measure(options, folder, args.tokens, args.rounds)
    report["bytes"] = {
        "token": pages / (args.rounds * args.tokens),
        "pages": pages,
        "files": sum(files),
        "ratio": sum(files) / pages,
    }
    report["restore"] = compare(times, "computed", "restored")
    report["first_token"] = compare(times, "computed", "plain")
    report["decode"] = compare(times, "step", "plain_step")
    for name in ("restore", "first_token", "decode"):
        print(name, json.dumps(report[name]))
    print("bytes", report["bytes"])
    save(args.output, report)


if __name__ == "__main__":
    main()
