"""Attention in Triton, its inline PTX emulated, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import REFERENCE, CaseSpec, Ops, Request, assert_attention, build_case
from ragged import RAGGED_MATRIX, WHOLE_MATRIX

from vllm_sparsekv.kernels.attention import triton as attention

TRITON = Ops(REFERENCE.pack, attention.sparse_attention, REFERENCE.write_window)
SLACK = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 1.6e-2}
"""Softmax weights meet the values in the values' type; the rest is float32."""
MAX_HISTORY = 450
"""Tokens of history; the interpreter takes a second for some hundred."""


def matches(spec: CaseSpec) -> None:
    assert_attention(build_case(spec), TRITON, SLACK[spec.dtype])


@pytest.mark.parametrize(
    "spec", [s for s in RAGGED_MATRIX if s.history_tokens <= MAX_HISTORY], ids=str
)
def test_ragged_matrix(spec):
    matches(spec)


@pytest.mark.parametrize(
    "spec",
    [s for s in WHOLE_MATRIX if 0 < s.history_tokens <= MAX_HISTORY // 2],
    ids=str,
)
def test_ragged_matrix_of_few_bits(spec):
    matches(spec)


CODECS = ("auto", "fp8", "int4")
DECODE = (Request(0, 1), Request(200, 1), Request(63, 1, hit=40), Request(0, 0))


@pytest.mark.parametrize("value_dtype", CODECS)
@pytest.mark.parametrize("key_dtype", CODECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_pair_of_codecs(dtype, key_dtype, value_dtype):
    matches(
        CaseSpec(
            DECODE,
            head_size=64,
            num_kv_heads=1,
            group=5,
            key_sparsity=0.3,
            key_dtype=key_dtype,
            value_dtype=value_dtype,
            dtype=dtype,
            window=24,
        )
    )


def mixed(head_size: int, sparsities: tuple[float, float], codecs: tuple[str, str]) -> CaseSpec:
    """Decode, a prefix-cache hit and a first token; sparsity and codec of keys, then of values."""
    return CaseSpec(
        (Request(70, 1), Request(33, 2, hit=20), Request(0, 1)),
        head_size=head_size,
        num_kv_heads=1,
        group=3,
        key_sparsity=sparsities[0],
        value_sparsity=sparsities[1],
        key_dtype=codecs[0],
        value_dtype=codecs[1],
        dtype=torch.bfloat16,
        window=16,
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("key_sparsity", "value_sparsity"),
    [(0.0, 0.5), (0.5, 0.0), (0.0, 0.0)],
    ids=["all of keys", "all of values", "all of both"],
)
@pytest.mark.parametrize("head_size", [64, 96])
def test_vectors_without_a_bitmap(head_size, key_sparsity, value_sparsity, codec):
    """96 fills no power of two."""
    matches(mixed(head_size, (key_sparsity, value_sparsity), (codec, codec)))


WHOLE_CODECS = [("int4", "int3"), ("int3", "int3"), ("int3", "int2"), ("int2", "int2")]


@pytest.mark.parametrize("capability", [0, 90])
@pytest.mark.parametrize(("key_dtype", "value_dtype"), WHOLE_CODECS)
@pytest.mark.parametrize("head_size", [80, 96, 128])
def test_whole_vectors_of_few_bits(monkeypatch, head_size, key_dtype, value_dtype, capability):
    """80 has no whole words. Two bits reach further, and other GPUs round them to bfloat16."""
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    spec = mixed(head_size, (0.0, 0.0), (key_dtype, value_dtype))
    rounded_codes = key_dtype == "int2" and not capability
    assert_attention(build_case(spec), TRITON, SLACK[spec.dtype] * (1.4 if rounded_codes else 1))


@pytest.mark.parametrize("capability", [0, 90])
@pytest.mark.parametrize("value_dtype", ["int3", "fp8"])
@pytest.mark.parametrize("head_size", [32, 96, 128, 160])
def test_keys_of_two_bands(monkeypatch, head_size, value_dtype, capability):
    """Halves of 48 and 80 fill no power of two."""
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    matches(mixed(head_size, (0.0, 0.0), ("int4_int2", value_dtype)))


@pytest.mark.parametrize("key_dtype", ["int4", "int3", "int2", "int4_int2"])
def test_queries_near_the_end_of_float16(key_dtype):
    spec = CaseSpec(
        (Request(40, 1),),
        num_kv_heads=1,
        key_sparsity=0.0,
        value_sparsity=0.0,
        key_dtype=key_dtype,
        value_dtype="int3",
        dtype=torch.float16,
        window=0,
    )
    case = build_case(spec)
    large = dataclasses.replace(case, query=case.query * 8192, scale=case.scale / 8192)
    assert_attention(large, TRITON, SLACK[torch.float16])


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("capability", [0, 80], ids=["not NVIDIA", "no fp8 conversion"])
@pytest.mark.parametrize("codec", CODECS)
def test_other_gpus(monkeypatch, capability, codec, sparsity):
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    matches(
        CaseSpec(
            DECODE,
            num_kv_heads=1,
            key_sparsity=sparsity,
            value_sparsity=sparsity,
            key_dtype=codec,
            value_dtype=codec,
            dtype=torch.bfloat16,
        )
    )


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_merge(monkeypatch, splits):
    """More splits than any history fills included."""
    choose = attention.choose_launch
    monkeypatch.setattr(
        attention, "choose_launch", lambda *shapes: choose(*shapes)._replace(splits=splits)
    )
    requests = (Request(1300, 1), Request(0, 3), Request(257, 2), Request(0, 0))
    matches(CaseSpec(requests, num_kv_heads=1, group=2, dtype=torch.float32, window=16))


def test_workspace_of_the_caller(monkeypatch):
    choose = attention.choose_launch
    monkeypatch.setattr(
        attention, "choose_launch", lambda *shapes: choose(*shapes)._replace(splits=3)
    )
    case = build_case(CaseSpec((Request(600, 1),), num_kv_heads=1, window=16))
    launch = choose(case.query, 1, 1, 1024)._replace(splits=3)
    needed = attention.workspace_elements(case.query, launch)
    workspace = torch.full((needed,), torch.nan)
    out = torch.empty_like(case.query)
    attention.sparse_attention(*case.attention_args(), out, workspace=workspace)
    error = (out[: case.num_tokens].double() - case.expected).abs().max()
    assert error < 2e-6
    assert not workspace.isnan().all()
    with pytest.raises(ValueError, match=f"workspace={needed - 1} elements: must be >= {needed}"):
        attention.sparse_attention(*case.attention_args(), out, workspace=workspace[1:])


def test_scale_must_be_positive():
    case = build_case(CaseSpec((Request(3, 1),)))
    arguments = list(case.attention_args())
    arguments[9] = 0.0
    with pytest.raises(ValueError, match=r"scale=0\.0: must be positive"):
        attention.sparse_attention(*arguments, torch.empty_like(case.query))


@pytest.mark.parametrize("value_dtype", ["int3", "fp8"])
def test_blocks_of_256_tokens(value_dtype):
    matches(
        CaseSpec(
            (Request(300, 1), Request(255, 1)),
            num_kv_heads=1,
            block_size=256,
            key_sparsity=0.0,
            value_sparsity=0.0,
            key_dtype="int4",
            value_dtype=value_dtype,
            dtype=torch.bfloat16,
        )
    )
