"""What the attention kernel compiles to, without a GPU: instructions, registers, spills, memory.

The instructions per unpacked element decide how fast decode can be at all; see
``docs/pages/gpu.md``. Budgets are the figures measured with the pinned Triton plus about 3 %.
"""

from __future__ import annotations

import functools

import pytest
import torch

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.settings import SparseKVConfig

pytest.importorskip("triton", reason="needs the triton package")
try:
    import sass
except ImportError as error:
    pytest.skip(f"this triton has no NVIDIA compiler: {error}", allow_module_level=True)

from vllm_sparsekv.kernels.attention import triton as attention  # noqa: E402
from vllm_sparsekv.kernels.attention.arguments import Partial, Ring, Vectors  # noqa: E402
from vllm_sparsekv.kernels.attention.launch import Launch, tile_and_warps  # noqa: E402
from vllm_sparsekv.kernels.pack import triton as pack  # noqa: E402
from vllm_sparsekv.kernels.pack.triton import num_warps, pack_constants  # noqa: E402
from vllm_sparsekv.kernels.step import triton as step  # noqa: E402
from vllm_sparsekv.kernels.step.change import Change  # noqa: E402
from vllm_sparsekv.kernels.window import triton as window  # noqa: E402

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = 64 * 1024
"""Of one multiprocessor, on every target here."""


CACHES = {
    "auto": (0.5, "auto", 0.5, "auto"),
    "fp8": (0.5, "fp8", 0.5, "fp8"),
    "int4": (0.5, "int4", 0.5, "int4"),
    "all int4, int3": (0.0, "int4", 0.0, "int3"),
    "all int3": (0.0, "int3", 0.0, "int3"),
    "all int3, int2": (0.0, "int3", 0.0, "int2"),
    "int4_int2, int3": (0.0, "int4_int2", 0.0, "int3"),
}
"""Sparsity and codec of keys, then of values; windows are as in presets of such."""


def cache_format(cache, head_size=128):
    key_sparsity, key_dtype, value_sparsity, value_dtype = CACHES[cache]
    basis = "any" if CODECS[key_dtype].bands > 1 else "none"
    whole = CODECS[key_dtype].integer and CODECS[value_dtype].integer
    window = (112, "int8") if whole and not key_sparsity + value_sparsity else (64, "auto")
    config = SparseKVConfig(key_sparsity, value_sparsity, key_dtype, value_dtype, *window, basis)
    return SparseFormat.from_config(config, head_size, torch.bfloat16)


@functools.cache
def report(capability, cache, head_size=128, rows=8, block_size=64, options=()):
    fmt = cache_format(cache, head_size)
    tile, num_warps = tile_and_warps(rows, head_size)
    launch = Launch(rows, tile, 8, num_warps)
    measured = sass.attention_report(
        fmt, capability, launch, block_size=block_size, options=options
    )
    return measured, launch


def warps_resident(measured, launch, capability):
    """Warps a multiprocessor can hold at once by registers and shared memory."""
    threads = 32 * launch.num_warps
    by_registers = REGISTERS // (threads * -(-measured.registers // 8) * 8)
    by_shared = SHARED_LIMIT[capability] // (measured.shared + 1024)
    return min(by_registers, by_shared) * launch.num_warps


DECODE = {
    (80, 128, "fp8"): 6.5,
    (80, 128, "all int4, int3"): 2.6,
    (90, 128, "auto"): 6.0,
    (90, 128, "fp8"): 4.35,
    (90, 128, "int4"): 5.2,
    (90, 128, "all int4, int3"): 2.6,
    (90, 128, "all int3"): 2.6,
    (90, 128, "all int3, int2"): 2.55,
    (90, 128, "int4_int2, int3"): 2.75,
    (90, 96, "all int4, int3"): 2.85,
    (90, 64, "int4"): 5.65,
    (90, 64, "all int4, int3"): 2.95,
    (90, 64, "int4_int2, int3"): 3.35,
    (100, 128, "all int4, int3"): 2.55,
}
"""(compute capability * 10, head size, cache) -> instructions per element of keys and values."""


@pytest.mark.parametrize(("capability", "head_size", "cache"), DECODE, ids=str)
def test_decode(capability, head_size, cache):
    measured, launch = report(capability, cache, head_size)
    assert measured.stack == 0, f"spills: {measured}"
    assert measured.prefetches, "the next block is asked for too late"
    assert measured.per_element <= DECODE[capability, head_size, cache], str(measured)
    assert warps_resident(measured, launch, capability) >= 8, str(measured)


@pytest.mark.parametrize(
    ("cache", "head_size", "rows", "block_size"),
    [
        ("fp8", 128, 8, 16),
        ("int4", 256, 16, 64),
        ("auto", 128, 32, 256),
        ("all int4, int3", 256, 8, 64),
        ("int4", 192, 8, 64),
        ("auto", 64, 16, 64),
        ("int4", 96, 16, 64),
        ("all int4, int3", 128, 32, 64),
        ("int4_int2, int3", 192, 8, 64),
        ("int4_int2, int3", 256, 8, 64),
        ("int4_int2, int3", 128, 32, 64),
    ],
)
def test_other_shapes_do_not_spill(cache, head_size, rows, block_size):
    measured, launch = report(90, cache, head_size, rows, block_size)
    assert measured.stack == 0, f"spills: {measured}"
    assert warps_resident(measured, launch, 90) >= 4, str(measured)


SLIDING, CAPPED = ("sliding_window", "sinks"), ("sliding_window", "soft_cap", "sinks")


@pytest.mark.parametrize(
    ("capability", "head_size", "cache", "options"),
    [
        (80, 128, "fp8", SLIDING),
        (90, 64, "int4", SLIDING),
        (90, 96, "all int4, int3", SLIDING),
        (90, 128, "fp8", CAPPED),
        (90, 128, "all int4, int3", CAPPED),
        (100, 128, "all int4, int3", CAPPED),
    ],
)
def test_decode_with_options(capability, head_size, cache, options):
    """Sliding windows and sinks cost whole tiles nothing, soft caps a little per score.

    A cap beside a window of int8 leaves two registers in memory, outside of loops.
    """
    measured, launch = report(capability, cache, head_size, options=options)
    more = 0.7 if "soft_cap" in options else 0
    plain, _ = report(capability, cache, head_size)
    assert measured.stack <= 8 and not measured.spills_in_loops, f"spills: {measured}"
    assert measured.per_element <= DECODE[capability, head_size, cache] + more, str(measured)
    warps = [warps_resident(x, launch, capability) for x in (measured, plain)]
    assert warps[0] == warps[1], f"{measured}, {plain}"


@pytest.mark.parametrize(
    ("cache", "head_size", "rows", "block_size"),
    [
        ("fp8", 64, 16, 16),
        ("all int4, int3", 64, 16, 64),
        ("int4", 256, 8, 64),
        ("auto", 256, 16, 16),
        ("int4_int2, int3", 128, 32, 64),
    ],
)
def test_other_shapes_do_not_spill_with_options(cache, head_size, rows, block_size):
    measured, launch = report(90, cache, head_size, rows, block_size, CAPPED)
    assert measured.stack == 0, f"spills: {measured}"
    assert warps_resident(measured, launch, 90) >= 4, str(measured)


@pytest.mark.parametrize(
    ("capability", "cache"),
    [(80, "fp8"), (80, "all int3"), (90, "int4"), (90, "int4_int2, int3"), (100, "auto")],
)
def test_pack_does_not_spill(capability, cache):
    fmt = cache_format(cache)
    pointers = {"key": "*bf16", "value": "*bf16", "slot_mapping": "*i64", "pages": "*u8"}
    constants = {"key_feedback": None, "value_feedback": None} | pack_constants(fmt, 64)
    _, stack = sass.resources(pack._pack, pointers, constants, capability, 4)
    assert stack == 0


@pytest.mark.parametrize(
    ("capability", "key", "head_size"),
    [(80, "int4", 64), (90, "int4_int2", 128)],
)
def test_pack_with_feedback_does_not_spill(capability, key, head_size):
    config = SparseKVConfig(0.0, 0.0, key, "int3", 64, basis="any")
    fmt = SparseFormat.from_config(config, head_size, torch.bfloat16)
    model = ("key", "value", "key_feedback", "value_feedback")
    pointers = dict.fromkeys(model, "*bf16") | {"slot_mapping": "*i64", "pages": "*u8"}
    _, stack = sass.resources(pack._pack, pointers, pack_constants(fmt, 64), capability, 4)
    assert stack == 0


@pytest.mark.parametrize("stored", ["*bf16", "*i8"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_window_and_merge_do_not_spill(capability, stored):
    lengths = dict.fromkeys(("query_start_loc", "seq_lens"), "*i32")
    vectors = dict.fromkeys(("key", "value"), Vectors("*bf16", "i32", "i32"))
    ring = Ring(stored, *["i32"] * 3, "*i32", *["i32"] * 3, "*i32", "i32")
    vectors |= {"ring": ring, "slot_mapping": "*i64"}
    sizes = {"SLOTS_PER_BLOCK": 8, "D": 128, "PADDED": 128}
    _, stack = sass.resources(window._write_window, lengths | vectors, sizes, capability, 4)
    assert stack == 0
    sums = {"partial": "*fp32", "lse": "*fp32", "out": "*bf16", "query_start_loc": "*i32"}
    sizes = {"D": 128, "PADDED": 128}
    _, stack = sass.resources(attention.merge_splits, sums, sizes, capability, 1)
    assert stack == 0


STEPS = [
    (80, "all int4, int3", 64),
    (90, "all int4, int3", 256),
    (90, "int4_int2, int3", 128),
    (100, "all int3, int2", 128),
]


@pytest.mark.parametrize(("capability", "cache", "head_size"), STEPS)
def test_step_does_not_spill(capability, cache, head_size):
    fmt, model = cache_format(cache, head_size), "*bf16"
    vectors, change = Vectors(model, "i32", "i32"), Change(model, "i32", model)
    rows = dict.fromkeys(("query", "key", "value"), vectors) | dict.fromkeys(
        ("asked", "stored_key", "stored_value", "key_feedback", "value_feedback"), model
    )
    changes = dict.fromkeys(("key_change", "value_change"), change)
    changes["query_change"] = Change(model, "i32", "constexpr")
    constants = {"GROUP": 4, **pack_constants(fmt, 64)}
    pointers = rows | changes | {"slot_mapping": "*i64", "pages": "*u8"}
    _, stack = sass.resources(step._prepare, pointers, constants, capability, num_warps(head_size))
    assert stack == 0

    ring = Ring("*i8", *["i32"] * 3, "*i32", *["i32"] * 3, "*i32", "i32")
    pointers = {
        "partial": Partial("*fp32", "*fp32"),
        **dict.fromkeys(("stored", "out", "key", "value"), vectors),
        "change": change,
        "ring": ring,
        **dict.fromkeys(("query_start_loc", "seq_lens"), "*i32"),
        "slot_mapping": "*i64",
    }
    sizes = {"GROUP": 4, "ROWS": 16, "D": head_size, "PADDED": head_size}
    sizes |= {"SLOTS_PER_BLOCK": 8}
    _, stack = sass.resources(step._finish, pointers, sizes, capability, num_warps(head_size))
    assert stack == 0
