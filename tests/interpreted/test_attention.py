"""Attention in Triton, its inline PTX emulated, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from compare import assert_attention
from helpers import REFERENCE, CaseSpec, Ops, Request
from histories import build_case
from ragged import RAGGED_MATRIX, SCORE_MATRIX, WHOLE_MATRIX, pairwise

from vllm_sparsekv.kernels.attention import history
from vllm_sparsekv.kernels.attention import triton as attention
from vllm_sparsekv.kernels.attention.arguments import Oldest

TRITON = Ops(REFERENCE.pack, attention.sparse_attention, REFERENCE.write_window)
SLACK = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 1.6e-2}
"""Softmax weights meet the values in the values' type; the rest is float32."""
MAX_TOKENS = 300
"""Of a batch, and heads of a case; the interpreter takes a second for some hundred tokens."""
MAX_HEADS = 2


def pairs(**axes: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Parameters of which every pair meets."""
    return pytest.mark.parametrize(list(axes), [list(chosen.values()) for chosen in pairwise(axes)])


def matches(spec: CaseSpec) -> None:
    assert_attention(build_case(spec), TRITON, SLACK[spec.dtype])


def few_heads(specs: Iterable[CaseSpec]) -> list[CaseSpec]:
    return [
        dataclasses.replace(spec, num_kv_heads=min(spec.num_kv_heads, MAX_HEADS)) for spec in specs
    ]


@pytest.mark.parametrize(
    "spec", few_heads(s for s in RAGGED_MATRIX if s.tokens <= MAX_TOKENS), ids=str
)
def test_ragged_matrix(spec):
    matches(spec)


@pytest.mark.parametrize(
    "spec",
    few_heads(s for s in WHOLE_MATRIX if s.history_tokens and s.tokens <= MAX_TOKENS // 2),
    ids=str,
)
def test_ragged_matrix_of_few_bits(spec):
    matches(spec)


@pytest.mark.parametrize(
    "spec",
    few_heads(s for s in SCORE_MATRIX if s.history_tokens and s.tokens <= MAX_TOKENS // 2),
    ids=str,
)
def test_ragged_matrix_of_options(spec):
    matches(spec)


CODECS = ("auto", "fp8", "int4")
DECODE = (Request(0, 1), Request(100, 1), Request(63, 1, hit=40), Request(0, 0))


@pairs(dtype=(torch.float16, torch.bfloat16), key_dtype=CODECS, value_dtype=CODECS)
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


@pairs(head_size=(64, 96), sparsities=((0.0, 0.5), (0.5, 0.0), (0.0, 0.0)), codec=CODECS)
def test_vectors_without_a_bitmap(head_size, sparsities, codec):
    """96 fills no power of two."""
    matches(mixed(head_size, sparsities, (codec, codec)))


WHOLE_CODECS = (("int4", "int3"), ("int3", "int3"), ("int3", "int2"), ("int2", "int2"))


@pairs(head_size=(80, 96, 128), codecs=WHOLE_CODECS, capability=(0, 90))
def test_whole_vectors_of_few_bits(monkeypatch, head_size, codecs, capability):
    """80 has no whole words. Two bits reach further, and other GPUs round them to bfloat16."""
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    spec = mixed(head_size, (0.0, 0.0), codecs)
    rounded_codes = codecs[0] == "int2" and not capability
    assert_attention(build_case(spec), TRITON, SLACK[spec.dtype] * (1.4 if rounded_codes else 1))


@pairs(head_size=(32, 96, 128, 160), value_dtype=("int3", "fp8"), capability=(0, 90))
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


@pairs(sparsity=(0.0, 0.5), capability=(0, 80), codec=CODECS)
def test_other_gpus(monkeypatch, capability, codec, sparsity):
    """Not of NVIDIA, and without a conversion of fp8."""
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


@pytest.fixture
def split_into(monkeypatch):
    """Cuts histories into as many parts as asked for."""
    choose = attention.choose_launch

    def use(splits: int) -> None:
        monkeypatch.setattr(
            attention, "choose_launch", lambda *shapes: choose(*shapes)._replace(splits=splits)
        )

    return use


@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits_merge(split_into, splits):
    """More splits than any history fills included."""
    split_into(splits)
    requests = (Request(260, 1), Request(0, 3), Request(129, 2), Request(0, 0))
    matches(CaseSpec(requests, num_kv_heads=1, group=2, dtype=torch.float32, window=16))


OPTIONS = {
    "sliding window": {"sliding_window": 200},
    "one page": {"sliding_window": 30, "sinks": True},
    "all": {"sliding_window": 170, "soft_cap": 1.5, "sinks": True},
    "of scores": {"soft_cap": 1.5, "sinks": True},
}


@pairs(options=tuple(OPTIONS), block_size=(16, 64), capability=(0, 90))
def test_options_in_splits(monkeypatch, split_into, options, block_size, capability):
    """Visible positions are shared out, sinks counted once; some splits have nothing.

    A block of the ring has 3 or 14 slots.
    """
    monkeypatch.setattr(attention, "capability", lambda device: capability)
    split_into(7)
    spec = CaseSpec(
        (Request(301, 1), Request(130, 2, hit=120), Request(0, 3), Request(0, 0)),
        head_size=128,
        num_kv_heads=1,
        group=3,
        block_size=block_size,
        key_sparsity=0.0,
        value_sparsity=0.0,
        key_dtype="int4",
        value_dtype="int3",
        dtype=torch.bfloat16,
        window=24,
        **OPTIONS[options],
    )
    assert spec.format.slots_per_block(block_size) == {16: 3, 64: 14}[block_size]
    matches(spec)


@triton.jit
def _shares(out, context, first, last, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """Four tiles of each split, for queries that see from ``first`` up to from ``last`` on."""
    oldest = Oldest(first, last, None)
    split = tl.program_id(2)
    start, whole_start, whole_end, end = history._share(split, context, oldest, WINDOW, TILE)
    tl.store(out + 4 * split, start)
    tl.store(out + 4 * split + 1, whole_start)
    tl.store(out + 4 * split + 2, whole_end)
    tl.store(out + 4 * split + 3, end)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("sliding_window", [1, 64, 512, 1000, 4096])
@pytest.mark.parametrize("context", [0, 1, 500, 4095, 4111, 9999])
def test_few_tiles_of_a_sliding_window_are_masked(context, sliding_window, splits):
    """Splits share what is seen, and mask no more than both its ends."""
    tile, window, tokens = 32, 64, 2
    first = context - sliding_window + 1
    out = torch.zeros(splits, 4, dtype=torch.int32)
    _shares[1, 1, splits](out, context, first, first + tokens - 1, WINDOW=window, TILE=tile)
    covered, whole = [], 0
    for start, whole_start, whole_end, end in out.tolist():
        covered += range(start, end)
        assert start <= whole_start <= max(start, end) and whole_end <= end
        assert start == whole_start or whole_start * tile < first + tokens - 1 + tile
        assert whole_end == 0 or whole_end * tile <= context - window
        whole += max(whole_end - whole_start, 0)
    assert covered == list(range(max(first, 0) // tile, -(-context // tile)))
    assert len(covered) - whole <= 1 + window // tile + 1


def test_soft_cap_of_huge_scores():
    spec = CaseSpec((Request(70, 1), Request(0, 3)), num_kv_heads=1, soft_cap=1.5, padding=0)
    case = build_case(spec)
    case.query.mul_(1e30)
    assert_attention(case, TRITON, SLACK[torch.float32])


@pytest.mark.parametrize("sink", [-torch.inf, -1e30, 1e4])
def test_extreme_sinks(sink):
    """One that nobody looks at changes nothing, one that takes everything leaves zeros."""
    spec = CaseSpec((Request(70, 1), Request(0, 3)), num_kv_heads=1, window=16, padding=0)
    case = build_case(dataclasses.replace(spec, sinks=True))
    case.sinks.fill_(sink)
    expected = build_case(spec).attend(TRITON) if sink < 0 else torch.zeros_like(case.query)
    torch.testing.assert_close(case.attend(TRITON), expected, rtol=0, atol=1e-6)


def test_workspace_of_the_caller(split_into):
    split_into(3)
    case = build_case(CaseSpec((Request(600, 1),), num_kv_heads=1, window=16))
    launch = attention.choose_launch(case.query, 1, 1, 1024)
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
