"""vLLM's model runner V2, whose own kernels are Triton's, under the interpreter."""

from __future__ import annotations

import interpreting


def test_engines():
    interpreting.run("test_engine_v2.py")
