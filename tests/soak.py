"""``make soak``: clients of every kind abuse a server whose cache holds three of their requests.

Then nothing may have crashed or grown, every block is free, a fixed prompt is answered as at the
start, and a stopped server leaves neither its port nor shared memory taken.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from server import Server, is_free, serve

MODEL = Path(__file__).resolve().parents[1] / ".cache" / "smollm2-135m-instruct"
CLIENTS = 48
MAX_LENGTH = 512
"""Tokens of the longest request."""
STEP_TOKENS = 64
"""Of a step, at most: vLLM keeps a product of every layer for each number of tokens it has met."""
REQUESTS_IN_CACHE = 3
SETTINGS = {"basis": "none", "preset": "balanced"}
CACHE_BYTES = REQUESTS_IN_CACHE * 4_500_000
"""A request of the demo model: 5,400 bytes for each of 512 tokens, 1,382,400 for its window."""
GROWTH = 48 << 20
"""Bytes by which resident memory may grow in the last quarter: allocators' slack."""
PROMPT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"

Answer = tuple[int, dict[str, Any]]


class Client:
    """Asks at random until it is told to stop; what goes wrong is kept for the report."""

    def __init__(self, server: Server, seed: int, vocabulary: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, until: float) -> None:
        kinds: dict[Callable[[], str | None], int] = {
            self.complete: 8,
            self.prefix: 4,
            self.choices: 2,
            self.scores: 2,
            self.leave_stream: 6,
            self.leave_at_once: 4,
            self.half_a_request: 1,
            self.bad_json: 2,
            self.bad_values: 2,
            self.oversize: 2,
        }
        while time.monotonic() < until:
            (kind,) = self.random.choices(list(kinds), list(kinds.values()))
            try:
                wrong = kind()
            except (OSError, http.client.HTTPException) as error:
                wrong = f"{type(error).__name__}: {error}"
            self.done[kind.__name__] += 1
            if wrong:
                self.wrong.append(f"{kind.__name__}: {wrong}")

    def tokens(self, most: int) -> list[int]:
        count = self.random.randint(1, most)
        return [self.random.randrange(3, self.vocabulary) for _ in range(count)]

    def complete(self) -> str | None:
        wanted = self.random.randint(1, 64)
        return self.expect(wanted, prompt=self.tokens(MAX_LENGTH - wanted), temperature=0.8)

    def prefix(self) -> str | None:
        """Shared by many clients, so that blocks are found, kept and given away."""
        shared = random.Random(self.random.randrange(4))
        start = [shared.randrange(3, self.vocabulary) for _ in range(256)]
        return self.expect(8, prompt=start + self.tokens(64), temperature=0)

    def choices(self) -> str | None:
        return self.expect(16, 3, prompt=self.tokens(128), n=3, temperature=1.0)

    def scores(self) -> str | None:
        return self.expect(4, prompt=self.tokens(300), logprobs=5, prompt_logprobs=2)

    def expect(self, tokens: int, choices: int = 1, **body: Any) -> str | None:
        """What is wrong with the answer to a request for so many tokens."""
        status, answer = ask(self.server, max_tokens=tokens, ignore_eos=True, **body)
        if status != 200:
            return f"status {status}: {answer}"
        found = answer["usage"]["completion_tokens"], len(answer["choices"])
        return None if found == (tokens * choices, choices) else f"{found} tokens and choices"

    def leave_stream(self) -> str | None:
        """Read a few pieces, then hang up."""
        connection, response = post(
            self.server, prompt=self.tokens(300), max_tokens=200, stream=True, ignore_eos=True
        )
        for _ in range(self.random.randint(0, 5)):
            response.readline()
        connection.close()
        return None if response.status == 200 else f"status {response.status}"

    def leave_at_once(self) -> str | None:
        """Hang up before there is an answer, at any moment of its prefill or its decode."""
        body = json.dumps({"model": "demo", "prompt": self.tokens(400), "max_tokens": 100}).encode()
        self.send_raw(body, len(body), self.random.random() * 2)
        return None

    def half_a_request(self) -> str | None:
        self.send_raw(b'{"model": "demo", "prompt": [', 4000, 0.2)
        return None

    def send_raw(self, body: bytes, length: int, seconds: float) -> None:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
            "Content-Type: application/json\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=60) as line:
            line.sendall(head.encode() + body)
            time.sleep(seconds)

    def bad_json(self) -> str | None:
        texts = [b"", b"{", b"[]", b'{"model": 3}', b"\xff\xfe", b'{"prompt": {"a": []}}', b"null"]
        return self.refuse(self.random.choice(texts))

    def bad_values(self) -> str | None:
        bad = [
            {"max_tokens": -1},
            {"temperature": -2},
            {"logprobs": 100000},
            {"prompt": []},
            {"prompt": [10**9]},
            {"n": 0},
            {"model": "another"},
            {"top_p": "much"},
        ]
        body = {"model": "demo", "prompt": "x", "max_tokens": 2} | self.random.choice(bad)
        return self.refuse(json.dumps(body).encode())

    def oversize(self) -> str | None:
        count = self.random.choice([MAX_LENGTH + 1, 4 * MAX_LENGTH, 50_000])
        return self.refuse(json.dumps({"model": "demo", "prompt": [5] * count}).encode())

    def refuse(self, body: bytes) -> str | None:
        _, response = post_bytes(self.server, body)
        response.read()
        return None if 400 <= response.status < 500 else f"status {response.status} to {body[:80]}"


def post_bytes(
    server: Server, body: bytes
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    return connection, connection.getresponse()


def post(
    server: Server, **body: Any
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    return post_bytes(server, json.dumps({"model": "demo"} | body).encode())


def ask(server: Server, **body: Any) -> Answer:
    connection, response = post(server, **body)
    try:
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def fixed_answer(server: Server) -> list[Any]:
    """Text and log-probabilities of the fixed prompt, computed anew: its cache salt is new."""
    status, answer = ask(
        server,
        prompt=PROMPT,
        max_tokens=48,
        temperature=0,
        logprobs=3,
        ignore_eos=True,
        cache_salt=os.urandom(8).hex(),
    )
    assert status == 200, answer
    choice = answer["choices"][0]
    return [choice["text"], choice["logprobs"]["token_logprobs"]]


def resident(server: Server) -> int:
    """Bytes that the server's processes have to themselves."""
    return sum(process.memory_full_info().uss for process in server.tree())


def shared_files(server: Server) -> set[str]:
    """Of the server's processes, in shared memory."""
    paths = {area.path for process in server.tree() for area in process.memory_maps()}
    return {path for path in paths if path.startswith("/dev/shm/")}


def abuse(server: Server, seconds: float, seed: int, vocabulary: int) -> list[Client]:
    until = time.monotonic() + seconds
    clients = [Client(server, 1000 * seed + i, vocabulary) for i in range(CLIENTS)]
    threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 120
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(left := {name: server.metric(name) for name in names}.values()):
        assert time.monotonic() < deadline, f"not free again: {left}"
        time.sleep(0.5)


def soak(seconds: float, seed: int, log: Path) -> None:
    """Start, abuse, check and stop a server.

    Raises:
        AssertionError: says what was wrong.
    """
    vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
    options = ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", str(CLIENTS)]
    options += ["--kv-cache-memory-bytes", str(CACHE_BYTES), "--block-size", "64"]
    options += ["--max-num-batched-tokens", str(STEP_TOKENS)]
    with serve(MODEL, SETTINGS, log, *options) as server:
        room = server.metric("sparsekv:cache_tokens") / MAX_LENGTH
        print(
            f"cache of {room:.2f} requests of {MAX_LENGTH} tokens, {CLIENTS} clients, seed {seed}"
        )
        assert REQUESTS_IN_CACHE - 1 < room < REQUESTS_IN_CACHE + 1
        before = fixed_answer(server)
        memory = []
        clients: list[Client] = []
        for part in range(4):
            clients += abuse(server, seconds / 4, 4 * seed + part, vocabulary)
            wait_until_idle(server)
            memory.append(resident(server))
            after = fixed_answer(server)
            assert after == before, f"the fixed prompt is answered otherwise: {before}, {after}"
            print(f"part {part + 1}/4: {memory[-1] >> 20} MiB resident", flush=True)
        report(server, clients)
        wrong = [line for client in clients for line in client.wrong]
        assert not wrong, f"{len(wrong)} wrong answers, the first: {wrong[:5]}"
        assert memory[3] - memory[2] <= GROWTH, f"memory grows: {memory}"
        wait_until_idle(server)
        shared = shared_files(server)
        stop(server)
    left = [path for path in shared if os.path.exists(path)]
    assert not left, f"left in shared memory: {left}"


def is_alive(process: psutil.Process) -> bool:
    """Not so if it has only not been waited for: an orphan's new parent takes its time."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def report(server: Server, clients: list[Client]) -> None:
    total = sum((client.done for client in clients), Counter())
    print(", ".join(f"{name} {count}" for name, count in sorted(total.items())))
    for name in ("num_preemptions", "prefix_cache_hits", "generation_tokens"):
        print(f"{name} {server.metric(f'vllm:{name}_total'):,.0f}")
    assert server.metric("vllm:num_preemptions_total") > 0, "the cache was never short"


def stop(server: Server) -> None:
    """As an operator stops it; what the engine said until then is looked at."""
    tree = server.tree()
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=90)
    assert code == 0, f"the server ended with {code}:\n{server.log.read_text()[-3000:]}"
    _, left = psutil.wait_procs(tree, timeout=10)
    left = [process for process in left if is_alive(process)]
    assert not left, f"still running: {left}"
    assert is_free(server.port), f"port {server.port} is taken"
    failed = [
        line
        for line in server.log.read_text().splitlines()
        if line.startswith("(EngineCore") and "Traceback" in line
    ]
    assert not failed, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        try:
            soak(args.seconds, args.seed, log)
        except AssertionError as error:
            sys.exit(f"{error}\n\n{log.read_text()[-4000:] if log.exists() else ''}")
    print("no crash, memory flat, blocks free, answers as at the start, port and memory released")


if __name__ == "__main__":
    main()
