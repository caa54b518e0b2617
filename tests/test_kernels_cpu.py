"""The native kernels against the reference and the float64 oracle, per instruction set."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import assert_attention, assert_same_bytes, attention_error
from helpers import REFERENCE, Case, CaseSpec, Ops, Request
from histories import build_case
from ragged import RAGGED_MATRIX, SCORE_MATRIX, WHOLE_MATRIX, batches

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.kernels.cpu import ops

NATIVE = Ops(ops.pack, ops.sparse_attention, ops.write_window)
MATRIX_ROWS = 17
"""Query rows of a unit from which on keys are multiplied as matrices."""
STORED = [("auto", torch.float32), ("auto", torch.bfloat16), ("auto", torch.float16)] + [
    (codec, torch.bfloat16) for codec in ("fp8", "int4", "int3", "int2", "int4_int2")
]


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def reference_case(spec: CaseSpec) -> Case:
    return build_case(spec)


@functools.cache
def reference_error(spec: CaseSpec) -> float:
    return attention_error(reference_case(spec))


def multiplies_tiles(spec: CaseSpec, isa: str) -> bool:
    """Whether attention takes ``kernels/attention/tiles.h``."""
    rows = spec.group * max((request.query for request in spec.requests), default=0)
    multiple = 64 if spec.key_dtype == "int4_int2" else 32
    fits = spec.dtype == torch.bfloat16 and spec.head_size % multiple == 0
    return isa == "amx" and fits and rows >= MATRIX_ROWS


def assert_same_memory(case: Case, expected: Case) -> None:
    assert_same_bytes(case.pages, expected.pages)
    if expected.window is not None:
        assert_same_bytes(case.window, expected.window)


def test_long_sums_are_as_exact_as_the_reference_s(isa):
    """Of 512 products, in parts: root mean squares of the errors, against fp64."""
    spec = CaseSpec(batches(64)["chunks"], head_size=512, num_kv_heads=1, group=4)
    case = build_case(spec)
    native, reference = (
        (case.attend(operations).double() - case.expected).square().mean().sqrt()
        for operations in (NATIVE, REFERENCE)
    )
    assert native <= 1.25 * reference


@pytest.mark.parametrize("spec", RAGGED_MATRIX + WHOLE_MATRIX + SCORE_MATRIX, ids=str)
def test_ragged_matrix(spec, isa):
    case = reference_case(spec)
    assert_same_memory(build_case(spec, NATIVE), case)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        # Products of bfloat16 add two rounded parts of each weight, or round it, by tiles of AMX.
        slack = 6e-6 if isa in ("amx", "avx512_bf16") else 3e-6
        assert_attention(case, NATIVE, slack, multiplies_tiles(spec, isa))
        # Root mean squares of the errors are up to 1.9 times the reference's own, whose order of
        # sums depends on the machine, and the largest is chance; and two roundings.
        budget = 4 * reference_error(spec) + 2 * torch.finfo(torch.float32).eps
        assert attention_error(case, NATIVE) <= budget


@pytest.mark.parametrize("codec, dtype", STORED)
@pytest.mark.parametrize(
    "head_size, survivors_share", [(64, 0.5), (80, 0.35), (256, 0.9), (128, 1.0)]
)
def test_pack_chooses_the_same_survivors(isa, codec, dtype, head_size, survivors_share):
    """Ties, zeros of both signs, subnormals, the extremes of the dtype, Inf and NaN."""
    if CODECS[codec].whole_only and survivors_share < 1:
        pytest.skip(f"{codec} stores whole vectors only")
    generator = torch.Generator().manual_seed(0)
    spec = CaseSpec(
        (),
        head_size=head_size,
        key_sparsity=1 - survivors_share,
        value_sparsity=0.0 if CODECS[codec].whole_only else 0.5,
        key_dtype=codec,
        value_dtype=codec if CODECS[codec].bands == 1 else "auto",
        dtype=dtype,
    )
    fmt, tokens = spec.format, 256
    info = torch.finfo(dtype)
    odd = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        info.max,
        -info.max,
        info.tiny,
        -info.smallest_normal / 4,
        448,
        464,
    ]
    special = torch.tensor([*odd, torch.inf, -torch.inf, torch.nan]).to(dtype)
    choice = torch.randint(len(special), (tokens, 2, head_size), generator=generator)
    noise = torch.randn(tokens, 2, head_size, generator=generator).to(dtype)
    few = torch.rand(tokens, 1, 1, generator=generator) ** 3
    x = torch.where(torch.rand(noise.shape, generator=generator) < few, special[choice], noise)
    finite = x[: tokens // 2].nan_to_num(0.0, 1.0, -1.0)
    x[: tokens // 2] = finite.clamp(-1e4, 1e4)

    slots = torch.arange(tokens).flip(0)
    pages = [torch.full((4, 2, 64, fmt.token_bytes), 0xFF, dtype=torch.uint8) for _ in range(2)]
    for implementation, memory in zip((NATIVE, REFERENCE), pages, strict=True):
        implementation.pack(x, x.flip(0), slots, memory, fmt)
    assert_same_bytes(*pages)


@pytest.mark.parametrize("codec", ["auto", "fp8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number_of_16_bits_is_packed_the_same(isa, dtype, sparsity, codec):
    """Every NaN among them; of float32, those that end in the same 16 bits."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    wide = dtype.itemsize == 4
    numbers = patterns << 16 | 0x1234 if wide else patterns.to(torch.int16)
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    size, block_size = 80, 64
    spec = CaseSpec(
        (),
        head_size=size,
        key_sparsity=sparsity,
        value_sparsity=sparsity,
        key_dtype=codec,
        value_dtype=codec,
        dtype=dtype,
    )
    key, value = (
        x.view(dtype)[: len(x) // size * size].view(-1, 1, size) for x in (numbers, numbers[order])
    )
    shape = (len(key) // block_size + 1, 1, block_size, spec.format.token_bytes)
    pages = [torch.zeros(shape, dtype=torch.uint8) for _ in range(2)]
    for implementation, memory in zip((NATIVE, REFERENCE), pages, strict=True):
        implementation.pack(key, value, torch.arange(len(key)), memory, spec.format)
    assert_same_bytes(*pages)


@pytest.mark.parametrize("codec", ["fp8", "int4", "auto"])
@pytest.mark.parametrize("length", [1, 16])
def test_nan_in_the_history_reaches_only_its_elements(isa, codec, length):
    """A NaN value spoils its element, a NaN key its request and KV head, as in the reference."""
    spec = CaseSpec(
        (Request(130, length), Request(70, length)),
        key_dtype=codec,
        value_dtype=codec,
        window=0,
        padding=0,
    )
    case = build_case(spec)
    pack = REFERENCE.pack
    key = torch.randn(2, 2, 64)
    value = key.flip(0).clone()
    key[0, 0, 5] = torch.nan
    value[1, 1, 7] = torch.nan
    slots = torch.stack(
        [case.block_table[0, 1].long() * 64 + 3, case.block_table[0, 0].long() * 64]
    )
    pack(key, value, slots, case.pages, case.fmt)
    expected, actual = case.attend(REFERENCE), case.attend(NATIVE)
    assert expected[:length].isnan().any() and not expected[length:].isnan().any()
    assert not expected[:length, 2:].isnan().all()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_every_fp8_value(isa):
    """Uniform weights over tokens whose values are all numbers of fp8, subnormals included."""
    spec = CaseSpec(
        (Request(64, 1), Request(5, 1)),
        head_size=256,
        value_sparsity=0.0,
        value_dtype="fp8",
        window=0,
        padding=0,
    )
    case = build_case(spec)
    code = torch.arange(256, dtype=torch.uint8)
    case.fmt.sections(case.pages).value_values[:] = code.masked_fill(code & 127 == 127, 0)
    case.query.zero_()
    expected = case.attend(REFERENCE)
    assert expected.abs().max() > 400
    torch.testing.assert_close(case.attend(NATIVE), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_working_memory_does_not_grow_with_the_context(isa, threads):
    """Peak growth of resident memory in a decode step on fresh threads, which hold no scratch."""
    spec = CaseSpec((Request(1 << 16, 1),), key_dtype="int4", value_dtype="int4", padding=0)
    case = build_case(spec, NATIVE)
    dense_bytes = 2 * spec.requests[0].context * spec.num_kv_heads * spec.head_size * 4

    def peak_growth(context: int) -> int:
        case.seq_lens[0] = context + 1
        grown = []

        def decode() -> None:
            torch.set_num_threads(threads)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            case.attend(NATIVE)
            grown.append(resident("VmHWM") - before)

        thread = threading.Thread(target=decode)
        thread.start()
        thread.join()
        return grown[0]

    peak_growth(1 << 12)
    short, long = peak_growth(1 << 12), peak_growth(1 << 16)
    assert long <= short + (256 << 10) < dense_bytes / 64


def resident(name: str) -> int:
    """A memory counter of this process, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) << 10


UNEQUAL = CaseSpec(
    (Request(4097, 1), Request(33, 2)), num_kv_heads=1, group=3, key_dtype="fp8", seed=3
)
"""Few pairs of request and KV head: with two threads the history is split and merged."""


@pytest.mark.parametrize(
    "options", [{}, {"sinks": True}, {"sinks": True, "sliding_window": 1000, "soft_cap": 1.5}]
)
def test_unequal_parts_of_one_long_request(isa, threads, options):
    assert_attention(build_case(replace(UNEQUAL, **options), NATIVE), NATIVE)


@pytest.mark.parametrize(
    "context, query, sliding_window, group",
    [(3000, 700, 100, 1), (3000, 700, 100, 3), (3000, 40, 600, 3), (1000, 700, 600, 1)],
)
def test_a_sliding_window_over_tiles_and_parts(isa, threads, context, query, sliding_window, group):
    """Tiles that see less and less of the history; in the last case some have empty parts."""
    spec = CaseSpec(
        (Request(context, query),), num_kv_heads=1, group=group, sliding_window=sliding_window
    )
    assert_attention(reference_case(spec), NATIVE)


@pytest.mark.parametrize("group", [1, 3])
def test_nan_that_the_sliding_window_has_passed_is_not_seen(isa, threads, group):
    """Of a key by any query, of a value by any tile of queries."""
    spec = CaseSpec(
        (Request(400, 300),), num_kv_heads=1, group=group, sliding_window=100, padding=0
    )
    case = build_case(spec)
    expected = case.attend(NATIVE)
    oldest = 400 - 100 + 1
    block = case.block_table[0, oldest // 64].long()
    case.fmt.sections(case.pages).key_values[block, :, oldest % 64] = 0xFF
    out = case.attend(NATIVE)
    assert out[0].isnan().all()
    assert_same_bytes(out[1:], expected[1:])

    case = build_case(spec)
    case.key[0] = torch.nan
    out = case.attend(NATIVE)
    assert out[:100].isnan().all()
    assert_same_bytes(out[100:], expected[100:])
    case = build_case(spec)
    case.value[0] = torch.nan
    assert_same_bytes(case.attend(NATIVE)[200:], expected[200:])

    case = build_case(replace(spec, sliding_window=20))
    expected = case.attend(NATIVE)
    slots = case.fmt.slots(case.window)
    slots.value[slots.tag - 1 < 400 - 20 + 1] = torch.nan
    assert_same_bytes(case.attend(NATIVE), expected)


@pytest.mark.parametrize("soft_cap, factor", [(1e4, 1), (30, 30), (30, 300), (1.5, 1e30)])
@pytest.mark.parametrize("query_len", [1, 40])
def test_soft_caps_of_tiny_and_of_huge_scores(isa, soft_cap, factor, query_len):
    spec = CaseSpec((Request(200, query_len), Request(7, 2)), soft_cap=soft_cap)
    case = build_case(spec)
    case.query.mul_(factor)
    budget = 4 * attention_error(case) + 2 * torch.finfo(torch.float32).eps
    assert attention_error(case, NATIVE) <= budget


@pytest.mark.parametrize("sink", [-torch.inf, -1e30, 1e4])
def test_extreme_sinks(isa, threads, sink):
    """One that nobody looks at changes nothing, one that takes everything leaves zeros."""
    case = build_case(replace(UNEQUAL, sinks=True))
    case.sinks.fill_(sink)
    expected = reference_case(UNEQUAL).attend() if sink < 0 else torch.zeros(3, 3, 64)
    torch.testing.assert_close(case.attend(NATIVE), expected, rtol=0, atol=3e-6)


def test_sinks_of_any_stride():
    case = build_case(replace(UNEQUAL, sinks=True))
    wide = case.sinks.repeat_interleave(2).double()
    assert_attention(replace(case, sinks=wide[::2]), NATIVE)


def test_tensors_of_a_fused_projection(isa):
    """Query, key and value are strided views of one tensor; out is one of a wider tensor."""
    case = reference_case(CaseSpec((Request(100, 3), Request(40, 1)), padding=0))
    heads, kv_heads = case.query.shape[1], case.key.shape[1]
    fused = torch.cat([case.query, case.key, case.value], dim=1)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    wide = torch.full((*case.query.shape[:2], 2 * case.query.shape[2]), torch.nan)
    out = wide[..., ::2]
    ops.sparse_attention(query, key, value, *case.attention_args()[3:], out)
    torch.testing.assert_close(out.double(), case.expected, rtol=0, atol=2e-6)
    assert wide[..., 1::2].isnan().all()


@pytest.mark.parametrize("options", [{}, {"sliding_window": 50, "soft_cap": 1.5, "sinks": True}])
def test_operators_under_torch_compile(options):
    case = build_case(CaseSpec((Request(100, 3), Request(40, 1)), padding=0, **options))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query, key, value, pages, window, slot_mapping, out):
        ops.pack(key, value, slot_mapping, pages, case.fmt)
        ops.sparse_attention(
            query,
            key,
            value,
            pages,
            window,
            *case.attention_args()[5:],
            out,
            **case.attention_options(),
        )
        ops.write_window(
            key,
            value,
            window,
            case.query_start_loc,
            case.seq_lens,
            slot_mapping,
            case.window_block_table,
            case.fmt,
        )
        return out * 2

    eager = build_case(case.spec)
    out = torch.zeros_like(case.query)
    doubled = step(
        case.query, case.key, case.value, case.pages, case.window, case.slot_mapping, out
    )
    eager.write_step(NATIVE)
    assert_same_memory(case, eager)
    torch.testing.assert_close(out.double(), case.expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(doubled, out * 2)
