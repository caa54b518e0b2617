"""``vllm serve --attention-backend sparsekv`` as a user runs it, with the openai client.

Two processes serve the API, so what any test gets either of them may have answered.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from engines import MODEL
from openai import OpenAI
from server import Server, is_free, serve

import vllm_sparsekv
from vllm_sparsekv.kernels.api import kernel_name

SETTINGS = {
    "key_sparsity": 0.5,
    "value_sparsity": 0.5,
    "key_dtype": "auto",
    "value_dtype": "auto",
}

API_SERVERS = 2

SETTINGS_SHOWN = {
    "model_name": "demo",
    "engine": "0",
    "version": vllm_sparsekv.__version__,
    "block_size": "64",
    "window": "64",
    "key_sparsity": "0.5",
    "value_sparsity": "0.5",
    "key_dtype": "auto",
    "value_dtype": "auto",
    "basis": "auto",
    "basis_sha256": "None",
    "skip_layers": "()",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    options = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 28)]
    options += ["--api-server-count", str(API_SERVERS)]
    with serve(MODEL, SETTINGS, log, *options, "--block-size", "64") as running:
        yield running


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=120)


@contextmanager
def api_server(server: Server, index: int) -> Iterator[None]:
    """Have one process take all connections: the others are stopped."""
    others = [p for p in server.tree() if "APIServer" in " ".join(p.cmdline())]
    assert len(others) == API_SERVERS
    del others[index]
    for process in others:
        process.suspend()
    try:
        yield
    finally:
        for process in others:
            process.resume()


def test_start_up_line_is_printed(server: Server) -> None:
    log = server.log.read_text()
    assert log.count("sparsekv: 30 full-attention layers: keys 50.0% asked, 50.0% effective") == 1
    assert "432 bytes per token and layer against 768 dense (1.78x)" in log


def test_completion(server: Server) -> None:
    answer = client(server).completions.create(
        model="demo", prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage.completion_tokens == 8


def test_every_api_server_answers(server: Server) -> None:
    answers = []
    for index in range(API_SERVERS):
        with api_server(server, index):
            answer = client(server).completions.create(
                model="demo", prompt="The capital of Italy is", max_tokens=8, temperature=0
            )
        answers.append(answer.choices[0].text)
    assert "Rome" in answers[0] and answers == [answers[0]] * API_SERVERS


def test_streaming_chat(server: Server) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    stream = client(server).chat.completions.create(
        model="demo", messages=[question], max_tokens=24, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert len(pieces) > 3
    assert "Paris" in "".join(pieces)


def test_two_concurrent_clients_get_the_answers_of_one(server: Server) -> None:
    # No two tokens are near each other here: other requests change the last bits of a product.
    prompts = ["The opposite of hot is", "The first president of the United States was"]

    def complete(prompt: str) -> str:
        answer = client(server).completions.create(
            model="demo", prompt=prompt, max_tokens=12, temperature=0
        )
        return answer.choices[0].text

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(complete, prompts)) == alone


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def assert_person(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"name", "age"} and type(found["age"]) is int


def test_json_schema(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Alice is 30 years old. Say so in JSON."}],
        max_tokens=80,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
    )
    assert_person(answer.choices[0].message.content)


def test_log_probabilities(server: Server) -> None:
    answer = client(server).completions.create(
        model="demo", prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=3
    )
    found = answer.choices[0].logprobs
    assert len(found.token_logprobs) == len(found.top_logprobs) == 4
    for chosen, best in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(best) == 3 and chosen == max(best.values()) <= 0


def test_metrics_answer(server: Server) -> None:
    client(server).completions.create(model="demo", prompt="Hello", max_tokens=2)
    assert server.metric("vllm:generation_tokens_total") >= 2


def samples(server: Server, prefix: str) -> dict[str, tuple[dict[str, str], float]]:
    """Labels and value of each metric whose name begins so, of those with one sample."""
    found = {}
    for line in server.get("/metrics").splitlines():
        if line.startswith(prefix):
            series, _, value = line.rpartition(" ")
            name, _, labels = series.partition("{")
            assert name not in found
            found[name] = dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value)
    return found


def test_metrics_of_the_sparse_cache(server: Server) -> None:
    """A token has 144 bytes in each of 3 heads of 30 layers, a ring two blocks of 64 such.

    All API servers are asked, which say the same once.
    """
    asked = []
    for index in range(API_SERVERS):
        with api_server(server, index):
            asked.append(samples(server, "sparsekv:"))
    found, *same = asked
    assert same == [found]
    cache, _ = samples(server, "vllm:cache_config_info")["vllm:cache_config_info"]
    labels, one = found.pop("sparsekv:config_info")
    assert one == 1 and labels | SETTINGS_SHOWN == labels
    assert labels["kernels"] == kernel_name("cpu")
    tokens = int(cache["kv_cache_size_tokens"])
    pages, dense = 2048 * 30 * 432, 2048 * 30 * 768
    ring = 2 * 64 * 30 * 432
    assert {name: value for name, (_, value) in found.items()} == {
        "sparsekv:token_bytes": 30 * 432,
        "sparsekv:dense_token_bytes": 30 * 768,
        "sparsekv:compression_ratio": 768 / 432,
        "sparsekv:ring_bytes": ring,
        "sparsekv:cache_tokens": tokens,
        "sparsekv:dense_cache_tokens": tokens * (pages + ring) // dense,
    }
    where = {"model_name": "demo", "engine": "0"}
    assert all(labels == where for labels, _ in found.values())


def test_shutdown_is_clean_and_releases_the_port(server: Server) -> None:
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    assert is_free(server.port)
    # vLLM's API servers may still ask the engine that has just stopped, a dense one too.
    failed = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
    assert all(line.startswith("(ApiServer_") for line in failed), failed
