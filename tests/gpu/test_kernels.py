"""The Triton kernels on a GPU: the ragged matrix, and CUDA-graph replay equal to eager.

Run with ``make test-gpu``; nothing of vLLM is needed. The ordinary run collects nothing here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import uniform
from compare import assert_attention, assert_same_bytes
from helpers import REFERENCE, CaseSpec, Ops, Request
from histories import build_case
from layers import layer_of
from ragged import RAGGED_MATRIX, SCORE_MATRIX, WHOLE_MATRIX
from steps import SPECS, assert_step

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.kernels.attention.triton import sparse_attention
from vllm_sparsekv.kernels.pack.triton import pack
from vllm_sparsekv.kernels.window.triton import write_window

TRITON = Ops(pack, sparse_attention, write_window)
DEVICE = "cuda"
SLACK = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("spec", RAGGED_MATRIX + WHOLE_MATRIX + SCORE_MATRIX, ids=str)
def test_ragged_matrix(spec):
    case, reference = build_case(spec, TRITON, DEVICE), build_case(spec)
    assert_same_bytes(case.pages, reference.pages)
    assert_attention(case, TRITON, SLACK[spec.dtype])
    case.write_step(TRITON)
    reference.write_step(REFERENCE)
    assert_same_bytes(case.pages, reference.pages)
    if case.window is not None:
        assert_same_bytes(case.window, reference.window)


def cache_of(codec: str) -> dict[str, Any]:
    """Keys of a codec, values of the same or of int3, half of them pruned where it can be."""
    sparsity = 0.0 if CODECS[codec].whole_only else 0.5
    return {
        "key_sparsity": sparsity,
        "value_sparsity": sparsity,
        "key_dtype": codec,
        "value_dtype": "int3" if CODECS[codec].bands > 1 else codec,
    }


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_step(spec, calibrated):
    assert_step(spec, layer_of(spec, calibrated, DEVICE), DEVICE)


LONG = tuple(Request(context, 1) for context in (0, 1, 8191, 12345, 30000, 63))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_size", "group"), [(64, 3), (128, 4), (128, 8), (256, 2)])
def test_long_histories(head_size, group, dtype, codec):
    """Many splits, every tile size of the launcher."""
    spec = CaseSpec(
        LONG,
        head_size=head_size,
        group=group,
        **cache_of(codec),
        dtype=dtype,
    )
    assert_attention(build_case(spec, TRITON, DEVICE), TRITON, SLACK[dtype])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("head_size", "group", "options"),
    [
        (64, 8, {"sliding_window": 128, "sinks": True}),
        (128, 4, {"sliding_window": 4096}),
        (256, 2, {"sliding_window": 4096, "soft_cap": 50.0}),
    ],
)
def test_long_histories_in_a_sliding_window(head_size, group, options, codec):
    """As gpt-oss, Mistral 7B and Gemma 2 have it."""
    spec = CaseSpec(
        LONG,
        head_size=head_size,
        group=group,
        **cache_of(codec),
        dtype=torch.bfloat16,
        **options,
    )
    assert_attention(build_case(spec, TRITON, DEVICE), TRITON, SLACK[torch.bfloat16])


@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize("codec", CODECS)
def test_graph_replay_equals_eager(codec, query_len):
    """Captured with no history at all, as vLLM captures; replayed with ragged lengths."""
    spec = CaseSpec(
        tuple(Request(context, query_len) for context in (5, 700, 64, 1999)),
        head_size=128,
        group=4,
        **cache_of(codec),
        dtype=torch.bfloat16,
        lookahead=query_len if query_len > 1 else 0,
        padding=0,
    )
    case, eager = build_case(spec, TRITON, DEVICE), build_case(spec, TRITON, DEVICE)
    actual = case.attend(TRITON)
    eager.write_step(TRITON)

    seq_lens = case.seq_lens.clone()
    window = case.window.clone()
    pages = case.pages.clone()
    case.seq_lens.fill_(query_len)
    out = torch.empty_like(case.query)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.step(TRITON, out)
    for _ in range(2):
        case.seq_lens.copy_(seq_lens)
        case.window.copy_(window)
        case.pages.copy_(pages)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bytes(out, actual)
        assert_same_bytes(case.pages, eager.pages)
        assert_same_bytes(case.window, eager.window)


@pytest.mark.parametrize("query_len", range(1, 9))
def test_a_graph_serves_other_batches(query_len):
    """Of fewer requests and other lengths than it was captured with."""
    specs = uniform.cases(query_len)
    warm = uniform.Step(specs, DEVICE)
    warm.run(TRITON)  # compiles, which a capture must not
    step = uniform.Step(specs, DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run(TRITON)
    for spec in specs * 2:
        step.load(spec)
        graph.replay()
        step.check(spec, SLACK[torch.bfloat16])
