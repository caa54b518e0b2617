"""Answer the same questions with the dense and the sparse KV cache and compare, side by side.

    python examples/demo.py [MODEL]

Both engines get the same memory for their cache and run one after the other.
"""

import argparse
import multiprocessing
import os
import shutil
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest

QUESTIONS = [
    "What is the capital of France, and what is it known for?",
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a whale.",
    "Give me three tips for learning a new language.",
]
CACHE_BYTES = 2**29
SPARSE = {
    "attention_backend": "sparsekv",
    "additional_config": {"sparsekv": {"preset": "capacity"}},
}


def answer(model: str, options: dict) -> dict:
    """Start an engine, answer the questions, and return the texts and what the cache holds."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, max_model_len=2048, kv_cache_memory_bytes=CACHE_BYTES, enforce_eager=True, **options
    )
    if llm.get_tokenizer().chat_template:
        ask, prompts = llm.chat, [[{"role": "user", "content": q}] for q in QUESTIONS]
    else:  # a base model goes on writing
        ask, prompts = llm.generate, QUESTIONS
    try:
        ask(prompts, SamplingParams(max_tokens=2), use_tqdm=False)  # warm up
        print("generating ...", flush=True)
        start = time.perf_counter()
        outputs = ask(prompts, SamplingParams(temperature=0, max_tokens=128))
        seconds = time.perf_counter() - start
    finally:
        llm.llm_engine.engine_core.shutdown()  # a pool's process ends only when its children have
    return {
        "texts": [output.outputs[0].text.strip() for output in outputs],
        "tokens/s": sum(len(output.outputs[0].token_ids) for output in outputs) / seconds,
        "capacity": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
    }


def answer_in_subprocess(model: str, options: dict) -> dict:
    """Run in a process of its own, so that all of the engine's memory is free afterwards."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(answer, model, options).result()


def print_columns(left: str, right: str) -> None:
    width = (shutil.get_terminal_size((120, 24)).columns - 3) // 2
    columns = [
        [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        for text in (left, right)
    ]
    for one, other in zip_longest(*columns, fillvalue=""):
        print(f"{one:<{width}} | {other}")


def print_row(name: str, left: str, right: str) -> None:
    print(f"{name:<30}{left:>12}{right:>12}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/smollm2-135m-instruct")
    model = parser.parse_args().model

    print("1/2: starting the dense engine, about a minute on a CPU ...", flush=True)
    dense = answer_in_subprocess(model, {})
    print("2/2: starting the sparse engine, two minutes more if it calibrates ...", flush=True)
    sparse = answer_in_subprocess(model, SPARSE)

    for question, left, right in zip(QUESTIONS, dense["texts"], sparse["texts"], strict=True):
        print(f"\n> {question}")
        print_columns("DENSE", "SPARSE")
        print_columns(left, right)

    runs = (dense, sparse)
    print()
    print_row(f"with {CACHE_BYTES / 2**20:.0f} MiB of KV cache", "dense", "sparse")
    print_row("tokens the cache holds", *(f"{run['capacity']:,}" for run in runs))
    print_row("cache bytes per token", *(f"{CACHE_BYTES / run['capacity']:,.0f}" for run in runs))
    print_row("tokens per second", *(f"{run['tokens/s']:.1f}" for run in runs))


if __name__ == "__main__":
    main()
