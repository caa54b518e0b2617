"""Ask about a long document, stop the engine, start another: it finds the document in files.

    python examples/keep_prefixes.py [MODEL] [--document FILE] [--tokens 2048] [--folder FOLDER]

A server keeps its prefixes likewise:

    vllm serve MODEL --attention-backend sparsekv --kv-transfer-config '{
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 1073741824,
            "secondary_tiers": [{"type": "fs", "root_dir": "/var/cache/prefixes"}]}}'
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

QUESTIONS = ["What is this document about?", "What does it say about trademarks?"]


def serve(life: int, args: argparse.Namespace) -> None:
    """One engine from its start to its end; every question comes after the whole document."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM

    slow_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    start = time.perf_counter()
    llm = LLM(
        args.model,
        attention_backend="sparsekv",
        dtype="float32" if slow_bfloat16 and not torch.cuda.is_available() else "auto",
        kv_cache_memory_bytes=2**29,
        enforce_eager=True,  # starts sooner
        kv_transfer_config={
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "cpu_bytes_to_use": 2**28,
                "secondary_tiers": [{"type": "fs", "root_dir": str(args.folder)}],
            },
        },
    )
    try:
        ask(llm, life, args, start)
    finally:
        llm.llm_engine.engine_core.shutdown()  # a pool's process ends only when its children have


def ask(llm, life: int, args: argparse.Namespace, start: float) -> None:
    from vllm import SamplingParams

    one_token = SamplingParams(temperature=0, max_tokens=1)
    tokenizer = llm.get_tokenizer()
    document = tokenizer.encode(args.document.read_text())[: args.tokens]
    # Another prompt of full length pays for what an engine does once.
    llm.generate({"prompt_token_ids": [life, *document[1:]]}, one_token, use_tqdm=False)
    print(f"engine {life}, started in {time.perf_counter() - start:.0f} s", flush=True)
    for question in QUESTIONS:
        prompt = {"prompt_token_ids": document + tokenizer.encode(f"\n\nQuestion: {question}\n")}
        start = time.perf_counter()
        [output] = llm.generate(prompt, one_token, use_tqdm=False)
        print(
            f"  first token after {time.perf_counter() - start:.2f} s, {output.num_cached_tokens} "
            f"of {len(output.prompt_token_ids)} tokens were cached",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--document", type=Path, default=Path(__file__).parent.parent / "LICENSE")
    parser.add_argument("--tokens", type=int, default=2048, help="of the document")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        for life in (1, 2):
            # Engines leave nothing behind but their process's end and the folder.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                process.submit(serve, life, args).result()
        files = list(args.folder.rglob("*.bin"))
        print(f"{sum(file.stat().st_size for file in files):,} bytes in {len(files)} files")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
