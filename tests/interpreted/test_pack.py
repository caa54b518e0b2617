"""Prune and pack in Triton: byte for byte the reference's pages."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from compare import assert_same_bytes
from helpers import REFERENCE
from histories import build_case
from ragged import AXES, EMPTY, matrix, pairwise

from vllm_sparsekv.format.feedback import feedback_matrix
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.pack.triton import pack
from vllm_sparsekv.settings import SparseKVConfig

TRITON = REFERENCE._replace(pack=pack)
CODECS = ("auto", "fp8", "int4")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def packed(implementation, x: torch.Tensor, fmt: SparseFormat, block_size: int = 16):
    """Pages with vectors x (num_tokens, num_kv_heads, D) as keys, their negatives as values."""
    tokens, heads, _ = x.shape
    shape = (2 + tokens // block_size, heads, block_size, fmt.token_bytes)
    pages = torch.full(shape, 0xFF, dtype=torch.uint8)
    slots = torch.arange(tokens).flip(0) + block_size
    slots[1::7] = -1
    implementation(x, -x, slots, pages, fmt)
    return pages


def awkward_vectors(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Ties, zeros of both signs, extremes, subnormals and steps that round to a tie."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(24, 2, size, generator=generator)
    x[0] = 1.0
    x[1] = torch.arange(size) % 3 - 1.0
    x[2] = 0.0
    x[3] = -0.0
    x[4, :, ::2] = 0.0
    x[5] *= 1e-7
    x[6] *= 300.0
    x[7] *= torch.finfo(dtype).max / 8
    x[8] = x[8].abs()
    x[9] = -x[9].abs()
    x[10] = (torch.arange(size) - size / 2) / 64
    x[11] = torch.arange(size) * 2.0**-9
    x[12] = 448.0 + torch.arange(size)
    x[13] = torch.arange(size).float() % 5 * 2.0**-24
    return x.to(dtype)


AWKWARD = pairwise(
    {
        "codec": CODECS,
        "dtype": DTYPES,
        "shape": ((64, 0.5, 0.3), (80, 0.0, 0.7), (128, 0.3, 0.0), (256, 0.3, 0.5)),
    }
)
"""Shapes are head size, sparsity of keys and of values."""


@pytest.mark.parametrize(
    ("codec", "dtype", "shape"), [list(chosen.values()) for chosen in AWKWARD], ids=str
)
def test_awkward_vectors(codec, dtype, shape):
    size, *sparsities = shape
    fmt = SparseFormat.from_config(SparseKVConfig(*sparsities, codec, codec, 0), size, dtype)
    x = awkward_vectors(size, dtype)
    assert_same_bytes(packed(pack, x, fmt), packed(REFERENCE.pack, x, fmt))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "codec"), [(64, "int3"), (80, "int3"), (80, "int2"), (128, "int2")]
)
def test_awkward_whole_vectors_of_few_bits(codec, size, dtype):
    fmt = SparseFormat.from_config(SparseKVConfig(0.0, 0.0, "int4", codec, 0), size, dtype)
    x = awkward_vectors(size, dtype)
    assert_same_bytes(packed(pack, x, fmt), packed(REFERENCE.pack, x, fmt))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 96, 128])
def test_awkward_keys_of_two_bands(size, dtype):
    config = SparseKVConfig(0.0, 0.0, "int4_int2", "int3", 0, basis="any")
    fmt = SparseFormat.from_config(config, size, dtype)
    x = awkward_vectors(size, dtype)
    x[14, :, size // 2 :] /= 64
    x[15, 0, 0], x[16, 0, -1] = torch.inf, torch.nan
    assert_same_bytes(packed(pack, x, fmt), packed(REFERENCE.pack, x, fmt))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans_survive_alike(dtype, codec):
    fmt = SparseFormat.from_config(SparseKVConfig(0.5, 0.5, codec, codec, 0), 64, dtype)
    x = torch.randn(8, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 5], x[1, 0, 6], x[2, 0, 7] = torch.inf, -torch.inf, torch.nan
    x[3, 0, 8:10] = torch.tensor([torch.inf, torch.nan])
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x[4, 0] = torch.arange(-64, 0, dtype=integer).view(dtype)  # all of them NaNs
    assert_same_bytes(packed(pack, x, fmt), packed(REFERENCE.pack, x, fmt))


FEW = AXES | {"batch": ("few",), "group": (1,), "window": ((0, 0, "auto"),)}
WHOLE = {"sparsities": ((0.0, 0.0),)}
PAGES = (
    *matrix(FEW),
    *matrix(FEW | WHOLE | {"codecs": (("int4", "int3"), ("int3", "int2"), ("auto", "int2"))}),
    *matrix(
        FEW
        | WHOLE
        | {
            "head_size": (64, 96, 128, 192, 256),
            "codecs": (("int4_int2", "int3"), ("int4_int2", "int2"), ("int4_int2", "auto")),
        }
    ),
    *EMPTY,
)
"""Of every layout; what a page holds does not depend on the batch."""


@pytest.mark.parametrize("spec", PAGES, ids=str)
def test_pages_of_every_layout(spec):
    ours, reference = build_case(spec, TRITON), build_case(spec)
    assert_same_bytes(ours.pages, reference.pages)
    ours.write_step(TRITON)
    reference.write_step()
    assert_same_bytes(ours.pages, reference.pages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize("key", ["int4", "int4_int2"])
def test_feedback(key, size, dtype):
    """Of random vectors all but those next to a tie, which sums decide."""
    config = SparseKVConfig(0.0, 0.0, key, "int3", 0, basis="any")
    fmt = SparseFormat.from_config(config, size, dtype)
    x = awkward_vectors(size, dtype)
    x[14, 0, 3] = torch.nan
    generator = torch.Generator().manual_seed(size)
    moment = torch.randn(2, 4 * size, size, dtype=torch.float64, generator=generator)
    moment *= torch.logspace(0, -2, size, dtype=torch.float64)
    feedback = dict.fromkeys(
        ("key_feedback", "value_feedback"), feedback_matrix(moment.mT @ moment).to(torch.bfloat16)
    )
    pages = [packed(partial(p, **feedback), x, fmt) for p in (pack, REFERENCE.pack)]
    plain = packed(REFERENCE.pack, x, fmt)
    assert (pages[0] != pages[1]).sum() <= 8 < (plain != pages[1]).sum()
