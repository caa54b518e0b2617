"""Error bounds and edge cases of the survivor codecs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparsekv.format.codecs import (
    CODECS,
    AutoCodec,
    Fp8Codec,
    Int2Codec,
    Int3Codec,
    Int4Codec,
    Int4Int2Codec,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8 = Fp8Codec(torch.float32)
INT4 = Int4Codec(torch.float32)
INT3 = Int3Codec(torch.float32)
INT2 = Int2Codec(torch.float32)
INT4_INT2 = Int4Int2Codec(torch.float32)
integers = pytest.mark.parametrize(
    ("codec", "steps"), [(INT4, 15), (INT3, 7.5), (INT2, 4)], ids=["int4", "int3", "int2"]
)


def round_trip(codec, values: torch.Tensor) -> torch.Tensor:
    packed, scales = codec.encode(values)
    assert packed.dtype == scales.dtype == torch.uint8
    assert packed.shape == (*values.shape[:-1], values.shape[-1] * codec.bits // 8)
    assert scales.shape == (*values.shape[:-1], codec.scale_bytes)
    decoded = codec.decode(packed, scales)
    assert decoded.dtype == torch.float32 and decoded.shape == values.shape
    return decoded


def vectors(largest: float):
    """Vectors of 8 to 32 float32 values up to ``largest``."""
    value = st.floats(-largest, largest, width=32)
    return st.lists(value, min_size=8, max_size=32).map(
        lambda values: torch.tensor(values[: len(values) // 8 * 8])
    )


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 2, 24), (1, 0, 16)])
def test_shapes(name, shape):
    for dtype in DTYPES:
        assert not round_trip(CODECS[name](dtype), torch.zeros(shape, dtype=dtype)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_is_exact(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor(
        [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, 1 + limits.eps]
        + [torch.inf, -torch.inf],
        dtype=dtype,
    )
    assert torch.equal(round_trip(AutoCodec(dtype), values), values.float())
    assert round_trip(AutoCodec(dtype), torch.full((4,), torch.nan, dtype=dtype)).isnan().all()
    assert AutoCodec(dtype).bits == {2: 16, 4: 32}[dtype.itemsize]


def test_fp8_decodes_every_byte_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    decoded = FP8.decode(codes, codes[:0])
    assert torch.equal(decoded.nan_to_num(nan=-1e9), expected.nan_to_num(nan=-1e9))
    assert (decoded.isnan().nonzero().squeeze() == torch.tensor([127, 255])).all()


def test_fp8_keeps_its_own_values():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()]
    assert torch.equal(round_trip(FP8, values), values)


@given(vectors(448.0))
def test_fp8_error_is_half_a_unit_in_the_last_place(values):
    """3 mantissa bits, smallest normal 2**-6: half a unit is 2**-4 relative, 2**-10 below."""
    error = (round_trip(FP8, values).double() - values.double()).abs()
    exponent = values.double().abs().clamp_min(2**-6).log2().floor()
    assert (error <= 2 ** (exponent - 4)).all()


def test_fp8_saturates():
    values = torch.tensor([448, 449, 464, 465, 480, 1e4, 3e38, -448, -449, -500, -65504, -3e38])
    assert round_trip(FP8, values).tolist() == [448.0] * 7 + [-448.0] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_turns_inf_and_nan_into_nan_and_leaves_the_rest(dtype):
    values = torch.tensor([torch.inf, 2.0, -torch.inf, torch.nan, -1.0, 0.5], dtype=dtype)
    decoded = round_trip(Fp8Codec(dtype), values)
    assert decoded.isnan().tolist() == [True, False, True, True, False, False]
    assert decoded[~decoded.isnan()].tolist() == [2.0, -1.0, 0.5]


def read_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of a vector, from one integer that holds all its bytes."""
    stream = int.from_bytes(packed.tolist(), "little")
    count = len(packed) * 8 // bits
    return torch.tensor([stream >> bits * i & 2**bits - 1 for i in range(count)]).double()


def read_scale(scales: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero (in codes) of a vector, from the scale bytes as the docstring draws them."""
    low_byte, high_byte = scales.int().unbind(-1)
    scale = high_byte << 8 | low_byte
    exponent, mantissa = scale >> 11, scale >> 7 & 15
    subnormal = mantissa * 2.0**-18
    step = torch.where(exponent == 0, subnormal, (1 + mantissa / 16) * 2.0 ** (exponent - 15))
    return step.double(), (scale & 127).double() / 2 ** (7 - bits)


@integers
@given(vectors(4.8e5))
def test_integer_error_is_half_a_step(codec, steps, values):
    """What codes lack is missing at both ends, all at one if zero would be below 0."""
    values = values * (steps / 15)
    packed, scales = codec.encode(values)
    step, zero = read_scale(scales, codec.bits)
    decoded = round_trip(codec, values).double()
    error = (decoded - values.double()).abs()
    ideal = (values.double().clamp_min(0).max() - values.double().clamp_max(0).min()) / steps
    if step >= 2**-14:
        beyond = steps * (1 + 2**-5 + 2**-11) - (2**codec.bits - 1)
        bound = max(0.5, beyond / 2 + 2 ** (codec.bits - 8) if zero > 0 else beyond)
        bound = step * (bound + (codec.gain - 1) * steps * (1 + 2**-5 + 2**-11))
        assert (error <= bound * (1 + 1e-5)).all()
        assert (step - ideal).abs() <= ideal * (2**-5 + 2**-11)
    else:
        assert (step - ideal).abs() <= 2**-19 + 2**-25
        assert (error <= step * (0.5 + (codec.gain - 1) * steps) + steps * 2**-19).all()
    assert torch.equal(decoded, step * (read_codes(packed, codec.bits) - zero)), "exact"


def test_int4_is_exact_on_its_own_levels():
    codes = torch.tensor([3, 0, 15, 7, 1, 8, 14, 2])
    values = -1.5 + 0.25 * codes
    packed, scales = INT4.encode(values)
    assert packed.tolist() == [0x03, 0x7F, 0x81, 0x2E]
    # 0.25 is float16 0x3400, without its sign and last 6 bits in bits 15..7; value 0 is code 6.
    assert scales.tolist() == [0x30, 0x68]
    assert torch.equal(INT4.decode(packed, scales), values)


@pytest.mark.parametrize("value", [1.0, -2.5, 65504.0, -65504.0, 9e5, 2**-10, -3.14159])
def test_int4_all_equal(value):
    """The range includes 0, so 15 codes span |value|; the steps differ by at most 2 ** -5."""
    decoded = round_trip(INT4, torch.full((2, 8), value))
    assert decoded.unique().numel() == 1
    assert (decoded - value).abs().max() <= abs(value) / 15 * (1 + 2**-5) / 2


def test_int4_zeros_are_exact():
    assert torch.equal(round_trip(INT4, torch.tensor([0.0, -0.0, 0.0, 0.0])), torch.zeros(4))


def test_int4_denormals_neither_turn_into_nan_nor_grow():
    tiny = torch.finfo(torch.float32).smallest_normal
    values = torch.tensor([tiny / 2, -tiny / 4, tiny, 0.0, 1e-9, -1e-8, 3e-8, 5e-8])
    assert torch.equal(round_trip(INT4, values), torch.zeros(8))
    values = torch.tensor([2**-18, -(2**-18), 15 * 2**-18, 7 * 2**-18])
    assert (round_trip(INT4, values) - values).abs().max() <= 2**-18


def test_int4_spans_all_of_float16():
    values = torch.tensor([-65504.0, 65504.0, 0.0, 32752.0])
    step = 65504 * 2 / 15 * (1 + 2**-5)
    assert (round_trip(INT4, values) - values).abs().max() <= step / 2


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, -torch.nan, 1e30, -1e6])
@integers
def test_vector_that_cannot_be_stored_is_nan_throughout(codec, steps, bad):
    values = torch.linspace(-1, 1, 8).repeat(2, 1)
    values[0, 5] = bad
    decoded = round_trip(codec, values)
    assert decoded[0].isnan().all()
    assert codec.encode(values)[1][0].tolist() == [0x80, 0xFF], "step is NaN, zero is 0"
    assert (decoded[1] - values[1]).abs().max() <= (1 + 2**-5) / steps


def test_int4_largest_step():
    """15 steps of 63488 are the largest range; from 64512 on a step rounds beyond float16."""
    values = torch.tensor([0.0, 15 * 64000, 0.0, 63488 * 7])
    decoded = round_trip(INT4, values)
    assert (decoded - values).abs().max() <= 63488 / 2
    assert round_trip(INT4, values.index_fill(0, torch.tensor(1), 15 * 64600.0)).isnan().all()


def test_int4_both_infinities():
    assert round_trip(INT4, torch.tensor([torch.inf, -torch.inf, 0, 1])).isnan().all()


def test_int3_bytes():
    """7 steps of 0.5 in the middle of a range of 7.5 steps."""
    values = torch.tensor([-1.875, 1.875, 0.0, 0.5, -0.5, 1.0, -1.0, 1.5])
    packed, scales = INT3.encode(values)
    # Value 0 is code 3.5 = 56 / 16, ties are to even: codes of -0.25, 7.25, 3.5, 4.5 and so on.
    codes = [0, 7, 4, 4, 2, 6, 2, 6]
    stream = sum(code << 3 * i for i, code in enumerate(codes))
    assert packed.tolist() == list(stream.to_bytes(3, "little"))
    assert scales.tolist() == [56, 0x70]  # float16 0.5 is 0x3800
    assert INT3.decode(packed, scales).tolist() == [0.5 * code - 1.75 for code in codes]


def test_int2_bytes():
    """3 steps of 0.5 in the middle of a range of 4 steps."""
    values = torch.tensor([-0.5, 1.5, 0.0, 0.5, -0.25, 1.0, 0.375, 0.75])
    packed, scales = INT2.encode(values)
    # Value 0 is code 1.5 - 17 / 16 = 14 / 32: codes of -0.625, 3.625, 0.4375, 1.5 and so on.
    codes = [0, 3, 0, 2, 0, 3, 1, 2]
    stream = sum(code << 2 * i for i, code in enumerate(codes))
    assert packed.tolist() == list(stream.to_bytes(2, "little"))
    assert scales.tolist() == [14, 0x70]
    assert INT2.decode(packed, scales).tolist() == [0.5 * code - 0.21875 for code in codes]


def test_int4_int2_bytes():
    """The exact levels of int4 with a step of 0.25, then the codes of test_int2_bytes."""
    first = -1.5 + 0.25 * torch.tensor([3, 0, 15, 7, 1, 8, 14, 2])
    second = torch.tensor([-0.5, 1.5, 0.0, 0.5, -0.25, 1.0, 0.375, 0.75])
    packed, scales = INT4_INT2.encode(torch.cat([first, second]))
    assert packed.tolist() == [0x03, 0x7F, 0x81, 0x2E, 0b10_00_11_00, 0b10_01_11_00]
    assert scales.tolist() == [0x30, 0x68, 14, 0x70]
    expected = [*first.tolist(), *(0.5 * code - 0.21875 for code in (0, 3, 0, 2, 0, 3, 1, 2))]
    assert INT4_INT2.decode(packed, scales).tolist() == expected


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 1e30])
def test_int4_int2_spoils_only_the_half_that_cannot_be_stored(bad):
    values = torch.linspace(-1, 1, 16).repeat(2, 1)
    values[0, 3] = values[1, 9] = bad
    nan = round_trip(INT4_INT2, values).isnan()
    assert nan.tolist() == [[True] * 8 + [False] * 8, [False] * 8 + [True] * 8]


@pytest.mark.parametrize(
    ("codec", "errors"),
    [(INT3, (0.0327, 0.0401, 0.0477)), (INT2, (0.1257, 0.1488, 0.1738))],
    ids=["int3", "int2"],
)
def test_gaussian_vectors(codec, errors):
    """Mean squared error over variance; the energy of a vector is kept on average."""
    for size, expected in zip((64, 128, 256), errors, strict=True):
        x = torch.randn(4000, size, generator=torch.Generator().manual_seed(size))
        decoded = round_trip(codec, x)
        assert (decoded - x).square().mean().item() == pytest.approx(expected, rel=0.02)
        assert (decoded * x).mean() / x.square().mean() == pytest.approx(1, abs=0.03)
