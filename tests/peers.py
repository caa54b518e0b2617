"""Engines in processes of their own that are asked one prompt after the other, for tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import first_logprobs, texts
from programs import program

CODE = """
import json, select, sys
from engines import engine, first_logprobs, generate, texts

def next_line(core):
    # Steps go on meanwhile, as in a server: they write pages.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        if core.scheduler.has_requests():
            core.step_fn()
    return sys.stdin.readline()

with engine(**json.loads(sys.argv[1])) as llm:
    print("READY", flush=True)
    while line := next_line(llm.llm_engine.engine_core.engine_core):
        prompt, max_tokens, params, fresh = json.loads(line)
        assert not fresh or llm.reset_prefix_cache()
        extra = {"extra_args": {"kv_transfer_params": params}} if params else {}
        (output,) = generate(llm, [prompt], max_tokens, logprobs=20, **extra)
        answer = {
            "cached": output.num_cached_tokens,
            "logprobs": first_logprobs(output),
            "text": texts([output])[0],
            "params": output.kv_transfer_params,
            "moved": sum(
                m.sum for m in llm.get_metrics() if m.name == "vllm:nixl_bytes_transferred"
            ),
        }
        print("ANSWER", json.dumps(answer), flush=True)
"""


class Peer:
    """One engine and its process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log
        self._read("READY")

    def ask(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        """The answer to :meth:`tell`."""
        self.tell(prompt, **options)
        return self.answer()

    def tell(
        self,
        prompt: list[int],
        params: dict[str, Any] | None = None,
        max_tokens: int = 4,
        fresh: bool = False,
    ) -> None:
        """Ask without waiting, once everything cached is forgotten if ``fresh``.

        Args:
            params: vLLM's ``kv_transfer_params``.
        """
        message = json.dumps([prompt, max_tokens, params, fresh])
        print(message, file=self.process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """``cached`` tokens, ``logprobs`` of the first token's candidates, ``text``, ``params`` of
        the transfer and the bytes ``moved`` over NIXL so far."""
        return json.loads(self._read("ANSWER"))

    def _read(self, word: str) -> str:
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise AssertionError(self._log.read_text()[-4000:])


@contextmanager
def peer(log: Path, options: dict[str, Any], **environment: str) -> Iterator[Peer]:
    """An engine with the ``options`` of :func:`engines.engine`, killed at the end.

    Args:
        log: file for what it prints besides.
        environment: besides this process's.
    """
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TORCHDYNAMO_DISABLE": "1",
    } | environment
    with program(CODE, json.dumps(options), log, **environment) as process:
        yield Peer(process, log)


def described(output: Any) -> dict[str, Any]:
    """What a peer would say of an answer of an engine in this process."""
    logprobs = {str(token): logprob for token, logprob in first_logprobs(output).items()}
    return {"cached": output.num_cached_tokens, "logprobs": logprobs, "text": texts([output])[0]}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], error: float = 1e-5) -> None:
    """Log-probabilities of all candidates for the first token of two answers."""
    assert actual["logprobs"].keys() == expected["logprobs"].keys()
    for token, logprob in expected["logprobs"].items():
        assert abs(actual["logprobs"][token] - logprob) <= error
