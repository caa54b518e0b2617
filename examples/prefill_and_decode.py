"""One engine computes a prompt, another decodes: pages go from one to the other over NIXL.

    pip install nixl
    python examples/prefill_and_decode.py [MODEL] [--document FILE] [--tokens 2048]

Servers are started with the same options, each with a VLLM_NIXL_SIDE_CHANNEL_PORT of its own; a
proxy sends `kv_transfer_params` of the first one's answer along with the request to the second.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

QUESTION = "\n\nQuestion: What is this document about?\nAnswer:"


def start(model: str, role: str, port: int) -> None:
    """Once in the process of each engine."""
    global llm
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this is a process of the engine's own
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    import torch
    from vllm import LLM

    slow_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    llm = LLM(
        model,
        attention_backend="sparsekv",
        dtype="float32" if slow_bfloat16 and not torch.cuda.is_available() else "auto",
        kv_cache_memory_bytes=2**29,
        enforce_eager=True,  # starts sooner
        kv_transfer_config={
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
        },
    )


def tokens_of(document: str, count: int) -> list[int]:
    tokenizer = llm.get_tokenizer()
    return tokenizer.encode(document)[:count] + tokenizer.encode(QUESTION)


def ask(prompt: list[int], max_tokens: int, transfer: dict) -> tuple[str, int, float, dict]:
    """Text, cached tokens, seconds, and where the pages are."""
    from vllm import SamplingParams

    # Else what is said to be cached is what was in the first engine.
    transfer.pop("remote_prefill_cached_tokens", None)
    start = time.perf_counter()
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, extra_args={"kv_transfer_params": transfer}
    )
    [output] = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return output.outputs[0].text, output.num_cached_tokens, seconds, output.kv_transfer_params


def stop() -> None:
    llm.llm_engine.engine_core.shutdown()  # a pool's process ends only when its children have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--document", type=Path, default=Path(__file__).parent.parent / "LICENSE")
    parser.add_argument("--tokens", type=int, default=2048, help="of the document")
    parser.add_argument("--port", type=int, default=5600, help="and the next one")
    args = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    roles = ("kv_producer", "kv_consumer")
    prefill, decode = (
        ProcessPoolExecutor(1, spawn, start, (args.model, role, args.port + place))
        for place, role in enumerate(roles)
    )
    with prefill, decode:
        for engine in (prefill, decode):  # the second in time: pages are held for half a minute
            engine.submit(tokens_of, QUESTION, 0).result()
        prompt = prefill.submit(tokens_of, args.document.read_text(), args.tokens).result()
        _, _, seconds, pages = prefill.submit(ask, prompt, 1, {"do_remote_decode": True}).result()
        print(f"prefill: {len(prompt)} tokens computed in {seconds:.2f} s", flush=True)
        text, cached, seconds, _ = decode.submit(ask, prompt, 32, pages).result()
        print(f"decode: {cached} of {len(prompt)} tokens were read, 32 more in {seconds:.2f} s")
        print(text)
        for engine in (decode, prefill):
            engine.submit(stop).result()


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
