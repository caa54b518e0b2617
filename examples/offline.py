"""Generate text offline with the sparse KV cache.

python examples/offline.py [MODEL]
"""

import argparse

from vllm import LLM, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Why do leaves change colour in autumn?",
    "Write two sentences about the sea.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=".cache/smollm2-135m-instruct")
    args = parser.parse_args()

    llm = LLM(
        args.model,
        attention_backend="sparsekv",
        additional_config={"sparsekv": {"preset": "balanced"}},
        max_model_len=2048,
        kv_cache_memory_bytes=2**30,
        enforce_eager=True,  # starts sooner
    )
    params = SamplingParams(temperature=0, max_tokens=64)
    if llm.get_tokenizer().chat_template:
        outputs = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], params)
    else:  # a base model goes on writing
        outputs = llm.generate(QUESTIONS, params)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"\n> {question}\n{output.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
