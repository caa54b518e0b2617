"""The window's writer in Triton: byte for byte the reference's rings."""

from __future__ import annotations

import pytest
from compare import assert_same_bytes
from helpers import REFERENCE
from histories import build_case
from ragged import AXES, RAGGED_MATRIX, matrix

from vllm_sparsekv.kernels.window.triton import write_window

TRITON = REFERENCE._replace(write_window=write_window)


SMALL = matrix(
    AXES
    | {
        "batch": ("decode", "hits", "prompts", "chunks", "speculative"),
        "head_size": (64, 80),
        "group": (1,),
        "block_size": (16,),
        "codecs": (("auto", "auto"), ("int4", "int4")),
        "sparsities": ((0.5, 0.5),),
        "window": tuple(window for window in AXES["window"] if window[0]),
    }
)
LARGE_BLOCKS = tuple(
    spec
    for spec in RAGGED_MATRIX
    if spec.window and spec.name in ("single", "empty rows", "no requests")
)
"""One request over the end of a block, and empty batches."""


@pytest.mark.parametrize("spec", SMALL + LARGE_BLOCKS, ids=str)
def test_ragged_matrix(spec):
    ours, reference = build_case(spec, TRITON), build_case(spec)
    assert_same_bytes(ours.window, reference.window)
    ours.write_step(TRITON)
    reference.write_step()
    assert_same_bytes(ours.window, reference.window)
