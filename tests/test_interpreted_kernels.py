"""Every Triton kernel against the reference, under Triton's interpreter."""

from __future__ import annotations

import interpreting


def test_kernels():
    interpreting.run("--ignore=test_engine_v2.py", ".")
