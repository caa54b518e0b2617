"""Sizes and layout of pages and window slots, as literal numbers."""

from __future__ import annotations

import re

import pytest
import torch

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.format.window import to_int8
from vllm_sparsekv.settings import PRESETS, SparseKVConfig

BF16 = torch.bfloat16

# head_size: {sparsity: (survivors, bytes of one vector as bf16, fp8, int4, fp32)}
VECTOR_BYTES = {
    64: {
        0.0: (64, 128, 64, 34, 256),
        0.3: (48, 104, 56, 34, 200),
        0.5: (32, 72, 40, 26, 136),
        0.7: (20, 48, 28, 20, 88),
    },
    80: {
        0.0: (80, 160, 80, 42, 320),
        0.3: (56, 122, 66, 40, 234),
        0.5: (40, 90, 50, 32, 170),
        0.7: (24, 58, 34, 24, 106),
    },
    96: {
        0.0: (96, 192, 96, 50, 384),
        0.3: (68, 148, 80, 48, 284),
        0.5: (48, 108, 60, 38, 204),
        0.7: (32, 76, 44, 30, 140),
    },
    128: {
        0.0: (128, 256, 128, 66, 512),
        0.3: (92, 200, 108, 64, 384),
        0.5: (64, 144, 80, 50, 272),
        0.7: (40, 96, 56, 38, 176),
    },
    256: {
        0.0: (256, 512, 256, 130, 1024),
        0.3: (180, 392, 212, 124, 752),
        0.5: (128, 288, 160, 98, 544),
        0.7: (80, 192, 112, 74, 352),
    },
}
STORAGE = (("auto", BF16), ("fp8", BF16), ("int4", BF16), ("auto", torch.float32))


HALF = {
    "key_sparsity": 0.5,
    "value_sparsity": 0.5,
    "key_dtype": "auto",
    "value_dtype": "auto",
    "window": 64,
    "window_dtype": "auto",
}


def make(head_size=64, dtype=BF16, lookahead=0, **settings) -> SparseFormat:
    config = SparseKVConfig(**HALF | settings)
    return SparseFormat.from_config(config, head_size, dtype, lookahead)


@pytest.mark.parametrize("head_size", VECTOR_BYTES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7])
def test_vector_bytes(head_size, sparsity):
    survivors, *sizes = VECTOR_BYTES[head_size][sparsity]
    for (codec, dtype), size in zip(STORAGE, sizes, strict=True):
        fmt = make(head_size, dtype, key_sparsity=sparsity, key_dtype=codec)
        assert fmt.key.survivors == survivors
        assert fmt.key.num_bytes == size
        assert fmt.key.sparsity == pytest.approx(1 - survivors / head_size)
        fmt = make(head_size, dtype, value_sparsity=sparsity, value_dtype=codec)
        assert (fmt.value.survivors, fmt.value.num_bytes) == (survivors, size)


def test_two_bands():
    """4 and 2 bits for half of the elements each, and two scales."""
    bands = {"key_sparsity": 0.0, "key_dtype": "int4_int2", "basis": "b"}
    for head_size, size in ((64, 28), (96, 40), (128, 52), (256, 100)):
        assert make(head_size, **bands).key.num_bytes == size
    with pytest.raises(ValueError) as error:
        make(80, **bands)
    assert str(error.value) == (
        "sparsekv.key_dtype='int4_int2': must be another one for head_size=80, "
        "which is no multiple of 32"
    )


def test_token_and_slot_bytes():
    fmt = make(128, key_sparsity=0.3, key_dtype="int4", value_dtype="fp8")
    assert (fmt.token_bytes, fmt.dense_token_bytes, fmt.slot_bytes) == (64 + 80, 512, 520)
    fmt = make(80, torch.float32)
    assert (fmt.token_bytes, fmt.dense_token_bytes, fmt.slot_bytes) == (340, 640, 648)
    fmt = make(80, torch.float32, window_dtype="int8")
    assert (fmt.token_bytes, fmt.slot_bytes, fmt.slot_elements) == (340, 168, 168)


@pytest.mark.parametrize(
    ("sparsity", "survivors"),
    # 64 elements: exact multiples of 4 stay, everything between goes up.
    [(0.9375, 4), (0.93, 8), (0.9, 8), (0.75, 16), (0.749, 20), (0.0001, 64), (1 / 3, 44)],
)
def test_survivors_round_up_to_a_multiple_of_4(sparsity, survivors):
    assert make(64, key_sparsity=sparsity).key.survivors == survivors


# 50 %, auto and a window of 64 tokens unless said. (settings, head_size, dtype, block_size, r, m)
RINGS = [
    ({}, 64, BF16, 64, 34, 2),
    ({}, 64, torch.float32, 64, 33, 2),
    ({}, 64, BF16, 16, 8, 8),
    ({"key_sparsity": 0.0, "value_sparsity": 0.0}, 64, BF16, 64, 62, 2),
    ({"key_dtype": "fp8", "value_dtype": "fp8"}, 64, BF16, 64, 19, 4),
    ({"key_dtype": "fp8", "value_dtype": "fp8"}, 64, BF16, 48, 14, 5),
    ({"key_dtype": "int4", "value_dtype": "int4"}, 64, BF16, 64, 12, 6),
    ({"key_dtype": "int4", "value_dtype": "int4"}, 64, BF16, 48, 9, 8),
    ({"key_dtype": "int4", "value_dtype": "int4"}, 64, BF16, 16, 3, 22),
    ({"key_dtype": "int4", "value_dtype": "int4", "key_sparsity": 0.3}, 128, BF16, 64, 14, 5),
    ({"key_dtype": "int4", "value_dtype": "int4"}, 256, torch.float32, 16, 1, 64),
    ({"window": 1}, 64, BF16, 64, 34, 1),
    ({"window": 32}, 64, BF16, 64, 34, 1),
    ({"window": 35}, 64, BF16, 64, 34, 2),
    ({"window": 0}, 64, BF16, 64, 34, 0),
    ({"window_dtype": "int8"}, 64, BF16, 64, 67, 1),
    ({"window_dtype": "int8", "window": 112}, 64, torch.float32, 64, 128, 1),
]


@pytest.mark.parametrize(("settings", "head_size", "dtype", "block_size", "r", "m"), RINGS)
def test_ring(settings, head_size, dtype, block_size, r, m):
    fmt = make(head_size, dtype, **settings)
    assert fmt.slots_per_block(block_size) == r
    assert fmt.blocks_per_ring(r) == m
    assert r * fmt.slot_bytes <= block_size * fmt.token_bytes < (r + 1) * fmt.slot_bytes


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize(("settings", "head_size", "dtype", "block_size", "r", "m"), RINGS)
def test_the_window_fills_its_ring(settings, head_size, dtype, block_size, r, m, lookahead):
    asked = make(head_size, dtype, lookahead=lookahead, **settings)
    fmt = asked.with_full_ring(block_size)
    blocks = asked.blocks_per_ring(r)
    assert fmt.min_ring_slots == r * blocks and fmt.blocks_per_ring(r) == blocks
    assert fmt.window >= asked.window and fmt.token_bytes == asked.token_bytes
    assert fmt.with_full_ring(block_size) == fmt


RING_SHAPES = [
    (preset, head_size)
    for preset in PRESETS
    for head_size in range(64, 257, 16)
    if head_size % (16 * CODECS[PRESETS[preset]["key_dtype"]].bands) == 0
]


@pytest.mark.parametrize(("preset", "head_size"), RING_SHAPES)
def test_a_ring_takes_what_its_window_needs(preset, head_size):
    config = SparseKVConfig.from_dict({"preset": preset})
    asked = SparseFormat.from_config(config, head_size, BF16)
    block_size = asked.default_block_size
    fmt = asked.with_full_ring(block_size)
    ring = fmt.blocks_per_ring(fmt.slots_per_block(block_size)) * block_size * fmt.token_bytes
    assert config.window <= fmt.window <= 1.25 * config.window
    assert ring <= 1.06 * fmt.window * fmt.slot_bytes


@pytest.mark.parametrize(
    ("settings", "head_size", "block_size"),
    [
        ({}, 64, 64),
        ({}, 128, 64),
        ({"preset": "capacity"}, 96, 64),
        ({"preset": "sparse-70"}, 256, 96),
        ({"preset": "capacity", "window": 0}, 96, 64),
    ],
)
def test_default_block_size(settings, head_size, block_size):
    config = SparseKVConfig.from_dict(settings)
    assert SparseFormat.from_config(config, head_size, BF16).default_block_size == block_size


@pytest.mark.parametrize(
    ("window", "lookahead", "slots"), [(64, 0, 64), (64, 1, 66), (64, 3, 68), (0, 3, 0), (1, 5, 7)]
)
def test_ring_has_room_for_lookahead(window, lookahead, slots):
    fmt = make(lookahead=lookahead, window=window)
    assert fmt.min_ring_slots == slots
    assert fmt.blocks_per_ring(1) == slots
    assert make(lookahead=3, window=64).blocks_per_ring(32) == 3


@pytest.mark.parametrize("head_size", [0, -16, 8, 24, 100])
def test_bad_head_size(head_size):
    message = refusal(make, head_size)
    assert message == f"head_size={head_size}: must be a positive multiple of 16"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_bad_dtype(dtype):
    valid = "[torch.float16, torch.bfloat16, torch.float32]"
    assert refusal(make, 64, dtype) == f"dtype={dtype}: must be one of {valid}"


@pytest.mark.parametrize("field", ["key_sparsity", "value_sparsity"])
@pytest.mark.parametrize(
    ("head_size", "sparsity", "largest"),
    [(64, 0.938, 0.9375), (80, 0.99, 0.95), (96, 0.97, 0.9583)],
)
def test_sparsity_that_leaves_too_few_survivors(field, head_size, sparsity, largest):
    message = refusal(make, head_size, **{field: sparsity})
    assert message == (
        f"sparsekv.{field}={sparsity}: leaves fewer than 4 of {head_size} elements, "
        f"must be <= {largest} for head_size {head_size}"
    )


@pytest.mark.parametrize("head_size", range(16, 528, 16))
def test_the_largest_sparsity_named_is_accepted(head_size):
    message = refusal(make, head_size, key_sparsity=0.999)
    largest = float(re.search(r"must be <= (\S+) for", message)[1])
    assert make(head_size, key_sparsity=largest).key.survivors in (4, 8)
    assert make(head_size, key_sparsity=1 - 4 / head_size).key.survivors == 4
    refusal(make, head_size, key_sparsity=largest + 2e-4)


@pytest.mark.parametrize("block_size", [0, -16, 1, 8, 24, 65])
def test_bad_block_size(block_size):
    message = refusal(make().slots_per_block, block_size)
    assert message == f"block_size={block_size}: must be a positive multiple of 16"


def test_block_size_whose_page_cannot_hold_a_slot():
    settings = {"key_sparsity": 0.98, "value_sparsity": 0.98}
    fmt = make(256, torch.float32, key_dtype="int4", value_dtype="int4", **settings)
    assert refusal(fmt.slots_per_block, 16) == (
        "block_size=16: a page of 16 tokens x 76 bytes cannot hold one window slot of 2056 bytes, "
        "must be >= 32"
    )
    assert fmt.slots_per_block(32) == 1


def test_sections_of_a_tile():
    """D=64, 16 tokens; keys 30 % int4 (k=48), values 50 % fp8 (k=32)."""
    fmt = make(64, key_sparsity=0.3, key_dtype="int4", value_dtype="fp8")
    pages = torch.arange(2 * 3 * 16 * 74).remainder(251).to(torch.uint8).view(2, 3, 16, 74)
    tile = pages.view(2, 3, -1)
    offset_and_width = [(0, 8), (128, 8), (256, 24), (640, 32), (1152, 2), (1184, 0)]
    for section, (offset, width) in zip(fmt.sections(pages), offset_and_width, strict=True):
        assert section.shape == (2, 3, 16, width)
        assert torch.equal(section.flatten(2), tile[..., offset : offset + 16 * width])
        assert offset % 16 == 0
    fmt.sections(pages).key_scales[1, 2, 15] = 255
    assert pages[1, 2].flatten()[1182:].tolist() == [255] * 2, "sections are views"


@pytest.mark.parametrize("head_size", VECTOR_BYTES)
@pytest.mark.parametrize("codec", ["auto", "fp8", "int4"])
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_sections_are_aligned_and_fill_the_tile(head_size, codec, block_size):
    fmt = make(head_size, key_sparsity=0.7, key_dtype=codec, value_dtype=codec)
    pages = torch.zeros(1, 1, block_size, fmt.token_bytes, dtype=torch.uint8)
    end = 0
    for section in fmt.sections(pages):
        if section.numel():
            assert section.storage_offset() == end and end % 16 == 0
        end += section.numel()
    assert end == pages.numel()


def test_sections_refuse_pages_of_another_format():
    pages = torch.zeros(1, 1, 16, 145, dtype=torch.uint8)
    assert refusal(make().sections, pages) == "pages hold 145 bytes a token, format has 144"


@pytest.mark.parametrize("dtype", [torch.float16, BF16, torch.float32])
def test_window_slots(dtype):
    fmt = make(16, dtype, key_sparsity=0.0)
    window = torch.zeros(2, 3, 4, fmt.slot_elements, dtype=dtype)
    slots = fmt.slots(window)
    slots.key[1, 2, 3] = 1.0
    slots.value[1, 2, 3] = 2.0
    slots.tag[1, 2, 3] = 0x01020304
    raw = window[1, 2, 3].view(torch.uint8)
    size = 16 * dtype.itemsize
    assert (raw[:size].view(dtype) == 1).all() and (raw[size : 2 * size].view(dtype) == 2).all()
    assert raw[2 * size :].tolist() == [4, 3, 2, 1, 0, 0, 0, 0]
    assert window.count_nonzero() - window[1, 2, 3].count_nonzero() == 0
    assert slots.tag.shape == (2, 3, 4) and slots.tag.dtype == torch.int32


def test_window_slots_of_int8():
    fmt = make(16, window_dtype="int8")
    window = torch.zeros(2, 3, 4, 40, dtype=torch.int8)
    slots = fmt.slots(window)
    slots.key[1, 2, 3], slots.key_step[1, 2, 3] = -1, 2.0
    slots.value[1, 2, 3], slots.value_step[1, 2, 3] = 127, 1.5
    slots.tag[1, 2, 3] = 0x01020304
    expected = [-1] * 16 + [127] * 16 + [4, 3, 2, 1, 0, 0x40, -0x40, 0x3F]
    assert window[1, 2, 3].tolist() == expected
    assert window.count_nonzero() - window[1, 2, 3].count_nonzero() == 0


def test_int8_is_nearest_and_never_larger():
    """Codes of a step that is cut off: a 127th of the largest magnitude, or up to 1 / 128 less."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).double()
    x *= 2.0 ** torch.linspace(-60, 60, 1000)[:, None]
    x = x.float()
    codes, step = to_int8(x)
    largest, wide = x.abs().amax(-1).double(), step.double()
    assert (wide * 127 <= largest).all() and (wide * 128 > largest).all()
    read = codes.double() * wide[:, None]
    error = (read - x.double()).abs() / wide[:, None]
    assert (error.sort(-1).values[:, :-1] <= 1.0).all() and (error < 1.01).all()
    assert (error[codes.abs() < 127] <= 0.5 + 1e-6).all()
    assert (read.abs() <= largest[:, None]).all()


def test_int8_of_what_is_no_number():
    x = torch.tensor([[0.0] * 4, [1.0, torch.inf, 0, 0], [torch.nan, 1, 0, 0], [1e-40, 0, 0, 0]])
    codes, step = to_int8(x)
    read = codes.float() * step.float().unsqueeze(-1)
    assert (read[0] == 0).all() and read[1:3].isnan().all() and (read[3] == 0).all()


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    return str(error.value)
