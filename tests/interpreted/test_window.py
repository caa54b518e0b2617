"""The window's writer in Triton: byte for byte the reference's rings."""

from __future__ import annotations

import pytest
from helpers import REFERENCE, assert_same_bytes, build_case
from ragged import RAGGED_MATRIX

from vllm_sparsekv.kernels.window.triton import write_window

TRITON = REFERENCE._replace(write_window=write_window)


@pytest.mark.parametrize(
    "spec", [s for s in RAGGED_MATRIX if s.window and s.history_tokens <= 300], ids=str
)
def test_ragged_matrix(spec):
    ours, reference = build_case(spec, TRITON), build_case(spec)
    assert_same_bytes(ours.window, reference.window)
    ours.write_step(TRITON)
    reference.write_step()
    assert_same_bytes(ours.window, reference.window)
