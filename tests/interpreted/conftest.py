"""Triton decides at import whether it interprets, so these tests get a process of their own.

``tests/interpreting.py`` starts it; the ordinary run collects nothing here.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
    from triton.backends import backends

    # vLLM's CPU build uses Triton where it has a backend for CPUs; what is interpreted needs none.
    backends["cpu"] = SimpleNamespace(driver=None)
else:
    collect_ignore_glob = ["test_*.py"]
