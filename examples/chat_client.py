r"""Chat with a running server and stream the answer.

Start a server in another terminal:

    vllm serve "$(make print-model)" --attention-backend sparsekv \
        --additional-config '{"sparsekv": {"preset": "balanced"}}' \
        --kv-cache-memory-bytes 1G --enforce-eager

    python examples/chat_client.py "Why is the sky blue?"
"""

import argparse

from openai import APIConnectionError, OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--base-url", default="http://localhost:8000/v1")
    parser.add_argument("--model", help="default: the model the server has loaded")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="EMPTY")
    try:
        stream = client.chat.completions.create(
            model=args.model or client.models.list().data[0].id,
            messages=[{"role": "user", "content": args.question}],
            max_tokens=128,
            temperature=0,
            stream=True,
        )
    except APIConnectionError:
        raise SystemExit(f"no server answers at {args.base_url}; start one first") from None
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
