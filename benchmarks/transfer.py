"""How soon a prompt's pages are back: from host memory, files and another engine over NIXL.

    python benchmarks/transfer.py [--tokens 2048]

Engines have answered another prompt of that length before. Times are of whole requests for one
token; log-probabilities of its 20 likeliest candidates are compared with a local prefix hit's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / ".cache" / "smollm2-135m-instruct"
MOVED = ("vllm:kv_offload_load_bytes", "vllm:nixl_bytes_transferred")


def start(args: argparse.Namespace, port: int, connector: dict[str, Any]) -> None:
    """Once in the process of each engine, which is in that process too."""
    global llm, tokens
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    from vllm import LLM

    tokens = args.tokens
    llm = LLM(
        args.model,
        attention_backend="sparsekv",
        dtype=args.dtype,
        max_model_len=2 * tokens,
        kv_cache_memory_bytes=2**29,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config={"kv_role": "kv_both"} | connector,
    )


def stop() -> None:
    llm.llm_engine.engine_core.shutdown()


def ask(prompt: int, transfer: dict[str, Any] | None = None, forget: bool = False) -> Any:
    from vllm import SamplingParams

    assert not forget or llm.reset_prefix_cache()
    draw = random.Random(prompt).randrange
    text = {"prompt_token_ids": [draw(1000, 20000) for _ in range(tokens + 1)]}
    extra = {"kv_transfer_params": transfer} if transfer else None
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20, extra_args=extra)
    before, begin = moved(), time.perf_counter()
    [output] = llm.generate(text, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    core = llm.llm_engine.engine_core.engine_core
    while transfer is None and core.scheduler.has_requests():  # what is kept arrives
        core.step_fn()
    groups = core.scheduler.kv_cache_config.kv_cache_groups
    pages = [group for group in groups if group.kv_cache_spec.prefix_cacheable]
    return {
        "seconds": seconds,
        "cached": output.num_cached_tokens,
        "logprobs": {one: entry.logprob for one, entry in output.outputs[0].logprobs[0].items()},
        "moved": moved() - before,
        "block": sum(len(one.layer_names) * one.kv_cache_spec.page_size_bytes for one in pages),
        "block_size": pages[0].kv_cache_spec.block_size,
        "where": output.kv_transfer_params,
    }


def moved() -> float:
    """Bytes into this engine's cache."""
    found = [metric for metric in llm.get_metrics() if metric.name in MOVED]
    return sum(getattr(metric, "value", 0) + getattr(metric, "sum", 0) for metric in found)


def show(route: str, computed: Any, hit: Any, back: Any) -> None:
    assert back["cached"] >= hit["cached"] > computed["cached"] == 0
    likely, again = hit["logprobs"], back["logprobs"]
    error = max(abs(likely[token] - again[token]) for token in likely.keys() & again.keys())
    times = " | ".join(f"{one['seconds']:.2f} s" for one in (computed, hit, back))
    ratio = computed["seconds"] / back["seconds"]
    pages = back["block"] * hit["cached"] / back["block_size"]
    part = back["moved"] / pages
    print(f"| {route} | {times} | {ratio:.1f}x | {error:.1e} | {part:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of the block size")
    args = parser.parse_args()

    def engine(port: int, connector: str, **extra: Any) -> ProcessPoolExecutor:
        options = {"kv_connector": connector, "kv_connector_extra_config": extra}
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, spawn, start, (args, 5600 + port, options))

    print("| route | computed | local hit | restored | faster | error | bytes, of the pages' |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        tiers = [{"type": "fs", "root_dir": folder}]
        for route in ("host memory", "files"):
            one = engine(0, "OffloadingConnector", cpu_bytes_to_use=2**28, secondary_tiers=tiers)
            one.submit(ask, 1 if route == "files" else 2).result()
            if route == "host memory":
                computed, hit = (one.submit(ask, 0).result() for _ in range(2))
            show(route, computed, hit, one.submit(ask, 0, forget=True).result())
            one.submit(stop).result()
            one.shutdown()
    prefill, decode = (engine(place, "NixlConnector") for place in range(2))
    decode.submit(ask, 2).result()
    for prompt in (1, 0):  # the first time they shake hands
        computed = prefill.submit(ask, prompt, {"do_remote_decode": True}).result()
        read = decode.submit(ask, prompt, computed["where"]).result()
    show("NIXL", computed, prefill.submit(ask, 0).result(), read)
    for one in (decode, prefill):
        one.submit(stop).result()
        one.shutdown()


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
