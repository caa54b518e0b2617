"""Rounding errors passed on: what it gains, and that every implementation does the same."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bytes
from helpers import REFERENCE

from vllm_sparsekv.format.feedback import block_length, feedback_matrix
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import ops
from vllm_sparsekv.kernels.pack.reference import pack_vectors, unpack_vectors
from vllm_sparsekv.settings import SparseKVConfig

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEADS, TOKENS = 2, 60


def reader(size: int, heads: int = HEADS) -> torch.Tensor:
    """(heads, D, D) float64 of eigenvalues 1 to 1e-4 in random directions."""
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(heads, size, size, dtype=torch.float64, generator=generator)
    turned = torch.linalg.qr(random).Q
    return turned @ torch.logspace(0, -4, size, dtype=torch.float64).diag() @ turned.mT


def format_of(size: int, key: str, value: str, dtype: torch.dtype = torch.float32) -> SparseFormat:
    config = SparseKVConfig(0.0, 0.0, key, value, 0, basis="any")
    return SparseFormat.from_config(config, size, dtype)


@pytest.mark.parametrize(
    ("size", "length"),
    [(16, 8), (32, 8), (64, 8), (80, 8), (96, 8), (128, 16), (192, 16), (256, 32), (512, 64)],
)
def test_blocks_divide_the_bands_of_a_vector(size, length):
    assert block_length(size) == length and size // 2 % length == 0


def test_errors_are_made_up_for_as_well_as_can_be():
    """Of two elements read as one sum the second takes in all of the first's error."""
    moment = torch.eye(16, dtype=torch.float64)
    moment[0, 8] = moment[8, 0] = 0.9
    matrix = feedback_matrix(moment)
    assert matrix[0, 8] == pytest.approx(0.9)
    matrix[0, 8] = 0
    assert not matrix.any()
    # Were all later elements not rounded, R would see no error in any of their directions.
    moment, length = reader(64)[0], block_length(64)
    matrix = feedback_matrix(moment)
    error = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for start in range(length, 64, length):
        block = slice(start, start + length)
        error[block] = -error[:start] @ matrix[:start, block]
    seen = (error @ moment).abs()
    assert seen[length:].max() < 1e-9 * seen[:length].max()


@pytest.mark.parametrize(
    ("codec", "gain"), [("int4", 2.5), ("int3", 2.5), ("int2", 2.2), ("int4_int2", 1.5)]
)
@pytest.mark.parametrize("size", [64, 128])
def test_what_reads_a_vector_sees_smaller_errors(size, codec, gain):
    """Mean eigenvalue over geometric mean is 11; integers that overflow and blocks take of it."""
    fmt = format_of(size, codec, "int3").key
    x = torch.randn(400, HEADS, size, generator=torch.Generator().manual_seed(2))
    moment = reader(size)
    errors = []
    for matrix in (None, feedback_matrix(moment)):
        error = (unpack_vectors(*pack_vectors(x, fmt, matrix), fmt) - x).double()
        errors.append(torch.einsum("nhi,hij,nhj->", error, moment, error).item())
    assert errors[0] / errors[1] > gain


def exact_vectors(size: int, codec: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors and a matrix whose sums are exact in float32, in any order.

    Multiples of 1 / 8 in a range of one step's power of two, and few bits in the matrix.
    """
    generator = torch.Generator().manual_seed(size)
    steps = {"int4": 15, "int3": 7.5, "int2": 4}[codec]
    x = torch.randint(-24, 25, (TOKENS, HEADS, size), generator=generator) / 8 * (steps / 8)
    x[..., 0], x[..., 1] = steps / 2, -steps / 2
    matrix = torch.randint(-4, 5, (HEADS, size, size), generator=generator) / 16
    block = torch.arange(size) // block_length(size)
    return x, matrix * (block[:, None] < block)


@pytest.mark.parametrize("codec", ["int4", "int3", "int2"])
@pytest.mark.parametrize("size", [16, 64, 96, 128, 256])
def test_native_bytes_are_the_references(isa, size, codec):
    fmt = format_of(size, codec if codec != "int2" else "int4", codec)
    x, matrix = exact_vectors(size, codec)
    pages = [torch.full((5, HEADS, 16, fmt.token_bytes), 0xFF, dtype=torch.uint8) for _ in "12"]
    slots = torch.randperm(80, generator=torch.Generator().manual_seed(3))[:TOKENS]
    slots[5] = -1
    feedback = {"key_feedback": matrix, "value_feedback": matrix.flip(0)}
    for pack, memory in ((ops.pack, pages[0]), (REFERENCE.pack, pages[1])):
        pack(x, x.flip(0), slots, memory, fmt, **feedback)
    assert_same_bytes(*pages)
    plain = torch.full_like(pages[0], 0xFF)
    REFERENCE.pack(x, x.flip(0), slots, plain, fmt)
    assert (plain != pages[0]).sum() > TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_native_keys_of_two_bands_are_the_references(isa, size, dtype):
    """Of random vectors all but those next to a tie, which sums decide; NaN stays in its vector."""
    fmt = format_of(size, "int4_int2", "int2", dtype)
    x = torch.randn(TOKENS, HEADS, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    x[3, 1, 5], x[4, 0, -1], x[5] = torch.nan, torch.inf, 0
    matrix = feedback_matrix(reader(size)).half()
    pages = [torch.zeros(4, HEADS, 16, fmt.token_bytes, dtype=torch.uint8) for _ in "12"]
    for pack, memory in ((ops.pack, pages[0]), (REFERENCE.pack, pages[1])):
        slots = torch.arange(TOKENS)
        pack(x, x, slots, memory, fmt, key_feedback=matrix, value_feedback=matrix)
    read = []
    for memory in pages:
        sections = fmt.sections(memory)[0::2]
        stored = [part.transpose(1, 2).flatten(0, 1)[:TOKENS] for part in sections]
        read.append(unpack_vectors(*stored, fmt.key))
    broken = read[0].isnan().any(-1)
    assert broken.nonzero().tolist() == [[3, 1], [4, 0]]
    assert torch.equal(read[0].isnan(), read[1].isnan())
    different = ((read[0] != read[1]) & ~read[1].isnan()).any(-1)
    assert different.sum() <= 1


def test_arguments_that_do_not_fit_are_refused():
    fmt = format_of(64, "int4", "int3")
    x, slots = torch.zeros(1, HEADS, 64), torch.zeros(1, dtype=torch.long)
    pages = torch.zeros(1, HEADS, 16, fmt.token_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"key_feedback has shape \(64, 64\): must be \(2, 64, 64"):
        api.pack(x, x, slots, pages, fmt, key_feedback=torch.zeros(64, 64))
    pruned = SparseFormat.from_config(SparseKVConfig(0.5, 0.5, "int4", "int4"), 64, torch.float32)
    pages = torch.zeros(1, HEADS, 16, pruned.token_bytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match="value_feedback is given: only whole integer vectors"):
        api.pack(x, x, slots, pages, pruned, value_feedback=torch.zeros(HEADS, 64, 64))
