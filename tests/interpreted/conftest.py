"""Triton decides at import whether it interprets, so these tests get a process of their own.

``tests/test_interpreted_triton.py`` starts it; the ordinary run collects nothing here.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
