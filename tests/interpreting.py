"""Tests under Triton's interpreter, which must be asked for before anything imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def run(*arguments: str) -> None:
    """Run tests of ``tests/interpreted`` in one process; modules are shorter than its start.

    Raises:
        AssertionError: one failed or was skipped, or there was none.
    """
    pytest.importorskip("triton", reason="needs the triton package")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
