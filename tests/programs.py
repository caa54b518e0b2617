"""Python programs that start engines in processes of their own, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


@contextmanager
def program(
    code: str, argument: str, log: Path, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """One that finds the modules of tests; killed at the end with all it started.

    Args:
        code: what it runs, with ``argument`` as the first of its own.
        log: file for its errors; input and output are pipes of text.
        environment: besides this process's.
    """
    path = [str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", code, argument],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        try:
            yield process
        finally:
            with suppress(psutil.NoSuchProcess):
                kill(psutil.Process(process.pid))


def kill(process: psutil.Process) -> None:
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
