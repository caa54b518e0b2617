"""Ask two questions about one long document: the second finds the document in the prefix cache.

python examples/long_document.py [MODEL] [--document FILE]
"""

import argparse
import time
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

QUESTIONS = [
    "In one sentence, what is this document about?",
    "What does the document say about trademarks?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--document", type=Path, default=Path(__file__).parent.parent / "LICENSE")
    args = parser.parse_args()
    document = args.document.read_text()

    # bfloat16 prompts are slow on CPUs without AVX-512.
    slow_bfloat16 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    llm = LLM(
        args.model,
        attention_backend="sparsekv",
        additional_config={"sparsekv": {"preset": "capacity"}},
        dtype="float32" if slow_bfloat16 and not torch.cuda.is_available() else "auto",
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,  # starts sooner
    )
    params = SamplingParams(temperature=0, max_tokens=48)
    chats = llm.get_tokenizer().chat_template is not None
    for question in QUESTIONS:
        prompt = f"{document}\n\nQuestion: {question}"
        start = time.perf_counter()
        if chats:
            [output] = llm.chat([{"role": "user", "content": prompt}], params)
        else:  # a base model goes on writing
            [output] = llm.generate(f"{prompt}\nAnswer:", params)
        seconds = time.perf_counter() - start
        print(f"\n> {question}\n{output.outputs[0].text}")
        print(
            f"[{seconds:.1f} s; {output.num_cached_tokens} of {len(output.prompt_token_ids)} "
            "prompt tokens came from the prefix cache]"
        )


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
