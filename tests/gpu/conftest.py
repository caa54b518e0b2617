"""Collected only where ``make test-gpu`` asks for it; there a missing GPU is an error."""

from __future__ import annotations

import os

if os.environ.get("SPARSEKV_TEST_GPU") != "1":
    collect_ignore_glob = ["test_*.py"]
