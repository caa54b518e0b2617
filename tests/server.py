"""``vllm serve`` with the sparse cache, as a user starts it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

START_SECONDS = 900
"""A loaded machine takes minutes."""


class Server(NamedTuple):
    """A running server, its process the head of a group of their own."""

    process: subprocess.Popen
    port: int
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples over engines and other labels."""
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in self.get("/metrics").splitlines()
            if line.partition(" ")[0].partition("{")[0] == name
        ]
        assert found, f"no metric {name}"
        return sum(found)

    def tree(self) -> list[psutil.Process]:
        """The server's process and all that it started."""
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]


@contextmanager
def serve(
    model: Path, settings: dict[str, Any], log: Path, *options: str, name: str = "demo"
) -> Iterator[Server]:
    """A server that answers, killed at the end with all it started if it still runs.

    Args:
        settings: under ``sparsekv`` in ``--additional-config``.
        log: file for what it prints.
        options: further ones of ``vllm serve``.
        name: of the model, for clients.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
    command += ["--attention-backend", "sparsekv", "--served-model-name", name]
    command += ["--additional-config", json.dumps({"sparsekv": settings}), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    server = Server(process, port, log)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        if process.poll() is None:
            for one in server.tree():
                one.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    """Whether another server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
