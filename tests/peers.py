"""Engines in processes of their own that are asked one prompt after the other, for tests.

They are forked off a process that has imported vLLM, which takes as long as a small engine starts.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from engines import engine, first_logprobs, generate, quick_starts, texts

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["peers"])
_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    ),
}
"""What the process has that peers are forked off."""


def _serve(
    asked: Connection, options: dict[str, Any], log: Path, environment: dict[str, str]
) -> None:
    """The process of a peer."""
    os.environ.update(environment)
    with log.open("w") as errors:
        for stream in (1, 2):
            os.dup2(errors.fileno(), stream)
    with quick_starts(), engine(**options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        asked.send("ready")
        while True:
            # Steps go on meanwhile, as in a server: they write pages.
            while not asked.poll(0.05):
                if core.scheduler.has_requests():
                    core.step_fn()
            try:
                prompt, max_tokens, params, fresh = asked.recv()
            except EOFError:
                return
            assert not fresh or llm.reset_prefix_cache()
            extra = {"extra_args": {"kv_transfer_params": params}} if params else {}
            (output,) = generate(llm, [prompt], max_tokens, logprobs=20, **extra)
            moved = (m.sum for m in llm.get_metrics() if m.name == "vllm:nixl_bytes_transferred")
            answer = {"params": output.kv_transfer_params, "moved": sum(moved)}
            asked.send(described(output) | answer)


class Peer:
    """One engine and its process."""

    def __init__(self, process: BaseProcess, asks: Connection, log: Path) -> None:
        self.process, self._asks, self._log = process, asks, log
        assert self._read() == "ready"

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
        self._asks.send((prompt, max_tokens, params, fresh))

    def answer(self) -> dict[str, Any]:
        """``cached`` tokens, ``logprobs`` of the first token's candidates, ``text``, ``params`` of
        the transfer and the bytes ``moved`` over NIXL so far."""
        return self._read()

    def _read(self) -> Any:
        try:
            return self._asks.recv()
        except EOFError:
            raise AssertionError(self._log.read_text()[-4000:]) from None


@contextmanager
def peer(log: Path, options: dict[str, Any], **environment: str) -> Iterator[Peer]:
    """An engine with the ``options`` of :func:`engines.engine`, killed at the end.

    Args:
        log: file for what it prints besides.
        environment: besides this process's.
    """
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        forkserver.ensure_running()
    asks, asked = _FORKS.Pipe()
    process = _FORKS.Process(target=_serve, args=(asked, options, log, environment))
    process.start()
    asked.close()
    try:
        yield Peer(process, asks, log)
    finally:
        with suppress(psutil.NoSuchProcess):
            _kill(psutil.Process(process.pid))
        process.join()
        asks.close()


def described(output: Any) -> dict[str, Any]:
    """What a peer would say of an answer of an engine in this process."""
    logprobs = {str(token): logprob for token, logprob in first_logprobs(output).items()}
    return {"cached": output.num_cached_tokens, "logprobs": logprobs, "text": texts([output])[0]}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], error: float = 1e-5) -> None:
    """Log-probabilities of all candidates for the first token of two answers."""
    assert actual["logprobs"].keys() == expected["logprobs"].keys()
    for token, logprob in expected["logprobs"].items():
        assert abs(actual["logprobs"][token] - logprob) <= error


def _kill(process: psutil.Process) -> None:
    """A process and all it started, which leave their shared memory behind."""
    tree = [process, *process.children(recursive=True)]
    shared = set()
    for one in tree:
        with suppress(psutil.NoSuchProcess):  # or a zombie, which maps nothing
            shared |= {Path(area.path) for area in one.memory_maps()}
    for one in tree:
        one.kill()
    for path in shared:
        if path.parent == Path("/dev/shm"):
            path.unlink(missing_ok=True)
