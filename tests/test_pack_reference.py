"""Prune and pack: which elements survive, where their bytes go, what comes back."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_same_bytes
from helpers import CaseSpec, Request
from histories import build_case
from hypothesis import given
from hypothesis import strategies as st
from oracle import pruned
from ragged import RAGGED_MATRIX, WHOLE_MATRIX

from vllm_sparsekv.format.codecs import CODECS, AutoCodec
from vllm_sparsekv.format.layout import SparseFormat, VectorFormat
from vllm_sparsekv.kernels.pack.reference import (
    pack,
    pack_vectors,
    survivor_mask,
    unpack_vectors,
)
from vllm_sparsekv.settings import SparseKVConfig

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Few distinct magnitudes, so that nearly every vector has ties across the cut.
TIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 6e-8, -6e-8])
ANY = st.floats(width=16)


@st.composite
def pruning(draw, element):
    """A vector, and a format that keeps some of it exactly."""
    size = draw(st.sampled_from([16, 32, 64, 80]))
    survivors = draw(st.integers(1, size // 4)) * 4
    dtype = draw(st.sampled_from(DTYPES))
    pool = draw(st.lists(element, min_size=1, max_size=24))
    x = draw(st.randoms(use_true_random=False)).choices(pool, k=size)
    return torch.tensor(x, dtype=dtype), VectorFormat(size, survivors, AutoCodec(dtype))


def expected_survivors(x: torch.Tensor, survivors: int) -> list[int]:
    """Indices, by sorting in Python: NaN, then Inf, then larger |x|, then lower index."""

    def rank(i: int) -> tuple[bool, float, int]:
        value = x[i].item()
        return (not math.isnan(value), 0.0 if math.isnan(value) else -abs(value), i)

    return sorted(sorted(range(len(x)), key=rank)[:survivors])


def check_exact(x: torch.Tensor, fmt: VectorFormat) -> None:
    kept = expected_survivors(x, fmt.survivors)
    assert survivor_mask(x, fmt.survivors).nonzero().squeeze(-1).tolist() == kept
    bitmap, values, scales = pack_vectors(x, fmt)
    if fmt.survivors == fmt.head_size:
        assert bitmap.numel() == 0
    else:
        assert sum(byte.bit_count() for byte in bitmap.tolist()) == fmt.survivors
        assert [i for i in range(len(x)) if bitmap[i // 8] >> (i % 8) & 1] == kept
    stored = values.view(x.dtype)
    survivors = x[kept] + 0.0
    assert_same_bytes(stored, survivors.masked_fill(survivors.isnan(), torch.nan))
    assert not torch.signbit(stored[stored == 0]).any(), "a surviving -0.0 is stored as 0"
    assert scales.numel() == 0
    y = unpack_vectors(bitmap, values, scales, fmt)
    expected = torch.zeros(len(x)).scatter(0, torch.tensor(kept), x[kept].float() + 0.0)
    # An addition may change the payload of a NaN, nothing else.
    assert y.isnan().tolist() == expected.isnan().tolist()
    assert_same_bytes(y.masked_fill(y.isnan(), 0), expected.masked_fill(y.isnan(), 0))


@given(pruning(TIES))
def test_exactly_k_survive_ties_to_the_lower_index(case):
    check_exact(*case)


@given(pruning(ANY))
def test_any_float_round_trips_inf_and_nan_first(case):
    check_exact(*case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_and_nan_are_never_dropped(dtype):
    x = torch.arange(1, 65).to(dtype)
    x[[7, 20, 33]] = torch.tensor([-torch.inf, torch.nan, torch.inf], dtype=dtype)
    y = unpack_vectors(*pack_vectors(x, (fmt := VectorFormat(64, 4, AutoCodec(dtype)))), fmt)
    assert y.nonzero().squeeze(-1).tolist() == [7, 20, 33, 63]
    assert y[7] == -torch.inf and y[33] == torch.inf and y[63] == 64 and y[20].isnan()
    x[:5] = torch.nan
    assert survivor_mask(x, 4).nonzero().squeeze(-1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("codec", ["auto", "fp8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_one_vector(codec, dtype):
    """The layout of the format module, written out: D=16, k=4, survivors 1, 4, 9, 15."""
    x = torch.zeros(16, dtype=dtype)
    x[[1, 4, 9, 15]] = torch.tensor([3.0, -1.5, 6.0, 1.5], dtype=dtype)
    fmt = VectorFormat(16, 4, CODECS[codec](dtype))
    bitmap, values, scales = pack_vectors(x, fmt)
    assert bitmap.tolist() == [0b0001_0010, 0b1000_0010]
    if codec == "auto":
        assert values.view(dtype).tolist() == [3.0, -1.5, 6.0, 1.5]
    elif codec == "fp8":
        assert values.tolist() == [0x44, 0xBC, 0x4C, 0x3C]
    else:
        assert values.tolist() == [0x09, 0x6F]  # low -1.5, step 0.5: codes 9, 0, 15, 6
        assert scales.tolist() == [0x18, 0x70]  # float16 0.5 is 0x3800; value 0 is code 24 / 8
    assert torch.equal(unpack_vectors(bitmap, values, scales, fmt), x.float())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("survivors", [4, 20, -4, 0])
def test_random_vectors_come_back_pruned(codec, head_size, survivors):
    survivors = survivors if 0 < survivors < head_size else head_size + min(survivors, 0)
    if CODECS[codec].whole_only and survivors < head_size:
        pytest.skip(f"{codec} stores whole vectors only")
    generator = torch.Generator().manual_seed(head_size + survivors)
    for dtype in DTYPES:
        x = (3 * torch.randn(5, 3, head_size, generator=generator)).to(dtype)
        fmt = VectorFormat(head_size, survivors, CODECS[codec](dtype))
        packed = pack_vectors(x, fmt)
        assert [part.shape[-1] for part in packed] == [
            fmt.bitmap_bytes,
            fmt.value_bytes,
            fmt.scale_bytes,
        ]
        assert torch.equal(unpack_vectors(*packed, fmt), pruned(x, fmt).float())


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64), (2, 0, 64)])
@pytest.mark.parametrize("codec", CODECS)
def test_no_vectors(shape, codec):
    fmt = VectorFormat(64, 64 if CODECS[codec].whole_only else 32, CODECS[codec](torch.float32))
    packed = pack_vectors(torch.empty(shape), fmt)
    assert unpack_vectors(*packed, fmt).shape == shape


@pytest.mark.parametrize("spec", RAGGED_MATRIX + WHOLE_MATRIX, ids=str)
def test_pages_hold_the_history_and_nothing_else(spec):
    """Every packed token unpacks to its pruned vectors; every other byte is still poison."""
    case = build_case(spec)
    sections = case.fmt.sections(case.pages)
    for row, request in enumerate(spec.requests):
        position = torch.arange(request.context)
        block = case.block_table[row, position // spec.block_size].long()
        offset = position % spec.block_size
        for x, fmt, first in ((case.keys, case.fmt.key, 0), (case.values, case.fmt.value, 1)):
            packed = [section[block, :, offset] for section in sections[first::2]]
            expected = pruned(x[row][: request.context], fmt).float()
            assert torch.equal(unpack_vectors(*packed, fmt), expected)
        for section in sections:
            section[block, :, offset] = 0xFF
    assert (case.pages == 0xFF).all(), "something was written outside the slots given"


def test_step_slots_and_padding():
    """Padding inside the mapping and tokens beyond its end are not written."""
    fmt = SparseFormat.from_config(SparseKVConfig(0.5, 0.5, "auto", "fp8"), 16, torch.float32)
    key = torch.arange(1, 5 * 2 * 16 + 1).float().view(5, 2, 16)
    key[[1, 4]] = torch.nan
    pages = torch.full((3, 2, 16, fmt.token_bytes), 0xFF, dtype=torch.uint8)
    pack(key, key / 8, torch.tensor([37, -1, 0, 16]), pages, fmt)
    sections = fmt.sections(pages)
    for token, block, offset in ((0, 2, 5), (2, 0, 0), (3, 1, 0)):
        stored = [section[block, :, offset] for section in sections[0::2]]
        expected = key[token] * (torch.arange(16) >= 8)
        assert torch.equal(unpack_vectors(*stored, fmt.key), expected)
    written = (sections.key_bitmap != 0xFF).any(-1)
    assert written.nonzero().tolist() == [
        [0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0], [2, 0, 5], [2, 1, 5]
    ]  # fmt: skip


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_nothing_to_pack(slots):
    case = build_case(CaseSpec((Request(5, 0),)))
    before = case.pages.clone()
    tokens = torch.full((len(slots), 2, 64), torch.nan)
    pack(tokens, tokens, torch.tensor(slots, dtype=torch.long), case.pages, case.fmt)
    assert_same_bytes(case.pages, before)


def test_packing_again_overwrites():
    """A block that vLLM hands out again keeps nothing of its former owner."""
    case = build_case(CaseSpec((Request(64, 1),), key_dtype="int4", value_dtype="fp8", window=0))
    slots = case.block_table[0, 0].long() * 64 + torch.arange(64)
    expected = case.pages.clone()
    stale = torch.full_like(case.keys[0][:64], torch.inf)
    pack(stale, -stale, slots, case.pages, case.fmt)
    assert not torch.equal(case.pages, expected)
    pack(case.keys[0][:64], case.values[0][:64], slots, case.pages, case.fmt)
    assert_same_bytes(case.pages, expected)
