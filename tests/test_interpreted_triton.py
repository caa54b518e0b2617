"""Runs ``tests/interpreted`` under Triton's interpreter: every kernel against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def test_under_the_interpreter():
    """In one process: it takes as long to start as some modules take to run."""
    pytest.importorskip("triton", reason="needs the triton package")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER]
    run = subprocess.run(
        command, env=environment, cwd=FOLDER.parent.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]
