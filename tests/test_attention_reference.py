"""The torch reference against float64 dense attention over explicitly pruned keys and values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_attention, assert_same_bytes, attention_error
from helpers import REFERENCE, CaseSpec, Request
from histories import build_case
from oracle import dense_attention
from ragged import RAGGED_MATRIX, SCORE_MATRIX, WHOLE_MATRIX
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_sparsekv.kernels.attention import reference

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MIXED = CaseSpec(
    (
        Request(130, 1),
        Request(0, 0),
        Request(90, 70, hit=80),
        Request(0, 33),
        Request(64, 1, hit=64),
        Request(200, 3),
    ),
    key_sparsity=0.7,
    value_dtype="fp8",
    window=24,
    lookahead=3,
)


@pytest.mark.parametrize("spec", RAGGED_MATRIX + WHOLE_MATRIX + SCORE_MATRIX, ids=str)
def test_ragged_matrix(spec):
    assert_attention(build_case(spec))


@pytest.mark.parametrize("block_size", [16, 48, 112])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_block_sizes_and_groups(block_size, group):
    assert_attention(build_case(replace(MIXED, block_size=block_size, group=group)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_sparsity_0_is_dense_attention(dtype, window, group):
    spec = replace(MIXED, key_sparsity=0.0, value_sparsity=0.0, value_dtype="auto")
    case = build_case(replace(spec, dtype=dtype, window=window, group=group))
    out, start = case.attend().double(), 0
    for key, value, request in zip(case.keys, case.values, spec.requests, strict=True):
        rows = slice(start, start + request.query)
        start += request.query
        expected = dense_attention(case.query[rows], key, value, case.scale)
        error = (out[rows] - expected).abs() - torch.finfo(dtype).eps / 2 * expected.abs()
        assert (error <= 2e-6).all()


def test_pruning_matters():
    """The oracle's pruning is not a formality: dense attention is far from the answer."""
    case = build_case(replace(MIXED, window=0))
    dense = dense_attention(case.query[:1], case.keys[0], case.values[0], case.scale)
    assert (case.attend()[:1].double() - dense).abs().max() > 0.05


@pytest.mark.parametrize("edge", ["first", "last"])
@pytest.mark.parametrize("context", [24, 25, 61, 150])
def test_both_edges_of_the_window(context, edge):
    """The first and the last position of the window are read dense, their neighbours are not."""
    case = build_case(CaseSpec((Request(context, 1),), window=24, lookahead=3, padding=0))
    expected = case.attend()
    ring = case.window_block_table.shape[1] * case.window.shape[2]
    first, last = context - 24, context - 1
    inside, outside = (first, first - 1) if edge == "first" else (last, last + 1)
    slots = case.fmt.slots(case.window)

    def slot_of(position: int) -> tuple[int, slice, int]:
        block, slot = divmod(position % ring, case.window.shape[2])
        return int(case.window_block_table[0, block]), slice(None), slot

    if outside >= 0:
        slots.key[slot_of(outside)] = slots.value[slot_of(outside)] = 100.0
        slots.tag[slot_of(outside)] = outside + 1
        assert_same_bytes(case.attend(), expected)
    assert (slots.tag[slot_of(inside)] == inside + 1).all()
    slots.value[slot_of(inside)] += 100.0
    assert (case.attend() - expected).abs().max() > 0.1, "the dense copy is not read"
    if edge == "first":
        # Without its tag the position comes from its page, as after a hit of one token more.
        slots.tag[slot_of(inside)] = 0
        requests = (Request(context, 1, hit=inside + 1),)
        assert_attention(replace(case, spec=replace(case.spec, requests=requests)))


@pytest.mark.parametrize("head", [0, 1])
def test_tags_are_read_per_head(head):
    """A head whose slot is empty reads its page; the other head is not touched."""
    case = build_case(CaseSpec((Request(40, 1),), group=1, padding=0))
    expected = case.attend()
    case.fmt.slots(case.window).tag[:, head] = 0
    out = case.attend()
    assert_same_bytes(out[:, 1 - head].contiguous(), expected[:, 1 - head].contiguous())
    missed = build_case(CaseSpec((Request(40, 1, hit=40),), group=1, padding=0))
    assert (out[:, head].double() - missed.expected[:, head]).abs().max() < 2e-6


@pytest.mark.parametrize("hit", [0, 10, 36, 37, 99, 100])
def test_prefix_hit_windows(hit):
    """Of the window 36 to 99 only what was computed after the hit is dense."""
    case = build_case(CaseSpec((Request(100, 5, hit),), key_sparsity=0.7))
    assert_attention(case)
    without = replace(case.spec, requests=(Request(100, 5, 0),))
    away = (case.expected - build_case(without).expected).abs().max()
    assert (away > 1e-3) == (hit > 36), "a missing slot must show in the answer"


def test_a_chunk_longer_than_the_ring():
    spec = CaseSpec((Request(150, 300), Request(70, 129, hit=64)), window=64)
    case = build_case(spec)
    ring = case.window_block_table.shape[1] * case.window.shape[2]
    assert ring < 129
    assert_attention(case)


@pytest.mark.parametrize("context", [1, 15, 16, 17, 31, 33])
def test_partial_last_pages(context):
    """What lies behind the last token of a page never matters, not even as a bit."""
    case = build_case(CaseSpec((Request(context, 1),), block_size=16, window=0))
    assert_attention(case)
    expected = case.attend()
    last, used = case.block_table[0, (context - 1) // 16], (context - 1) % 16 + 1
    for byte in (0x00, 0x55, 0x7F):
        for section in case.fmt.sections(case.pages):
            section[last, :, used:] = byte
        assert_same_bytes(case.attend(), expected)


def test_memory_of_nobody_is_not_read():
    """Other bytes in unused blocks, in block 0 and under positions in the window: same bits."""
    case = build_case(MIXED)
    expected = case.attend()
    owned = {
        int(block)
        for row, key in zip(case.block_table, case.keys, strict=True)
        for block in row[: -(-len(key) // 64)]
    }
    unused = [block for block in range(len(case.pages)) if block not in owned]
    assert 0 in unused and len(unused) >= 3
    case.pages[unused] = 0x3C
    rings = set(case.window_block_table.flatten().tolist())
    unused = [block for block in range(len(case.window)) if block not in rings - {0}]
    case.window[unused] = 1.0
    assert_same_bytes(case.attend(), expected)


def test_pages_under_the_window_are_not_read():
    case = build_case(CaseSpec((Request(100, 1),), window=64))
    expected = case.attend()
    position = torch.arange(36, 100)
    for section in case.fmt.sections(case.pages):
        section[case.block_table[0, position // 64].long(), :, position % 64] = 0xFF
    assert_same_bytes(case.attend(), expected)


def test_nan_stays_where_it_is_real():
    """In its own request, and there not in queries that come before it."""
    case = build_case(MIXED)
    expected = case.attend()
    start = int(case.query_start_loc[2])
    case.key[start + 30] = torch.nan
    out = case.attend()
    assert_same_bytes(out[: start + 30], expected[: start + 30])
    assert out[start + 30 : start + 70].isnan().all()
    assert_same_bytes(out[start + 70 :], expected[start + 70 :])


@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_of_one_request_leaves_the_others_alone(where):
    spec = CaseSpec(tuple(Request(context, 1) for context in (70, 70, 100, 3)), padding=0)
    case = build_case(spec)
    expected = case.attend()
    getattr(case, where)[1] = torch.inf
    for section in case.fmt.sections(case.pages):
        section[case.block_table[1, 0]] = 0xFF
    out = case.attend()
    assert out[1].isnan().any()
    assert_same_bytes(out[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("factor", [30.0, -30.0, 300.0])
def test_large_scores_neither_overflow_nor_vanish(factor):
    """Scores up to about 1,000 and down to about -1,000; float32 keeps them to about 1e-4."""
    case = build_case(replace(MIXED, value_dtype="auto"))
    case.query.mul_(factor)
    assert attention_error(case) < 2e-3


def test_one_key_gets_weight_one_however_low_its_score():
    case = build_case(CaseSpec((Request(0, 1),), padding=0))
    case.key[0] = -1e4 * case.query[0, ::2]
    assert_same_bytes(case.attend(), case.value.repeat_interleave(2, 1))


def test_scale_is_applied():
    case = replace(build_case(MIXED), scale=0.5)
    assert_attention(case, slack=2e-5)
    assert (build_case(MIXED).expected - case.expected).abs().max() > 0.05


@pytest.mark.parametrize("elements", [1, 1 << 12, 1 << 15])
def test_tiles_of_any_size_give_the_same(monkeypatch, elements):
    case = build_case(MIXED)
    monkeypatch.setattr(reference, "TILE_ELEMENTS", elements)
    assert_attention(case)


SEEN = CaseSpec(
    (Request(130, 1), Request(90, 70, hit=80), Request(200, 3), Request(5, 2)), window=24, padding=0
)


@pytest.mark.parametrize("sliding_window", [1, 23, 24, 25, 64, 100])
def test_the_edge_of_a_sliding_window(sliding_window):
    """The oldest position a query sees counts, the one before it does not."""
    case = build_case(replace(SEEN, requests=(Request(130, 1),), sliding_window=sliding_window))
    expected = case.attend()
    oldest = 131 - sliding_window

    def changed(position: int) -> float:
        value = case.fmt.sections(case.pages).value_values
        block = case.block_table[0, position // 64].long()
        before = value[block, :, position % 64].clone()
        value[block, :, position % 64] = 0x42
        difference = (case.attend() - expected).abs().max().item()
        value[block, :, position % 64] = before
        return difference

    assert changed(oldest - 1) == 0
    if sliding_window > 24 + 1:  # else the ring holds it, or it is of this step
        assert changed(oldest) > 0.1


def test_sliding_window_soft_cap_and_sinks_matter():
    """Each changes the answer, so that a case that has it can tell."""
    plain = build_case(SEEN).expected
    for option in ({"sliding_window": 40}, {"soft_cap": 1.5}, {"sinks": True}):
        assert (build_case(replace(SEEN, **option)).expected - plain).abs().max() > 0.05


def test_a_sliding_window_over_the_whole_context_is_none():
    case = build_case(SEEN)
    wide = build_case(replace(SEEN, sliding_window=203))
    assert_same_bytes(wide.attend(), case.attend())


@pytest.mark.parametrize("sink", [-1e30, 1e4])
def test_extreme_sinks(sink):
    """One that nobody looks at changes nothing, one that takes everything leaves zeros."""
    case = build_case(replace(SEEN, sinks=True))
    case.sinks.fill_(sink)
    expected = build_case(SEEN).attend() if sink < 0 else torch.zeros_like(case.query)
    torch.testing.assert_close(case.attend(), expected, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.is_view or func._schema.is_mutable:
            return result
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def largest_tensor(*requests: Request) -> int:
    case = build_case(CaseSpec(requests, key_dtype="fp8", value_dtype="int4"))
    out = torch.empty_like(case.query)
    with LargestTensor() as largest:
        REFERENCE.sparse_attention(*case.attention_args(), out)
    return largest.bytes


def test_working_memory_does_not_grow_with_the_history(monkeypatch):
    """A decode step and a prompt chunk, over histories of 1 to 16 times the tile."""
    tile = 1 << 16
    monkeypatch.setattr(reference, "TILE_ELEMENTS", tile)
    tokens = tile // (2 * 64)
    decode = [largest_tensor(Request(n * tokens, 1)) for n in (1, 4, 16)]
    assert decode[0] == decode[1] == decode[2] <= 8 * tile
    batch = [largest_tensor(*[Request(n * tokens // 4, 1)] * 4) for n in (1, 4, 16)]
    assert batch[0] == batch[1] == batch[2] <= 8 * tile
    chunk = [largest_tensor(Request(n * tokens, 64)) for n in (1, 4, 16)]
    assert chunk[0] == chunk[1] == chunk[2] <= 8 * tile


def test_working_memory_does_not_grow_with_the_square_of_a_prompt(monkeypatch):
    """Beside its tiles a prompt needs only tensors of the size of its queries."""
    monkeypatch.setattr(reference, "TILE_ELEMENTS", 1 << 16)
    for length in (256, 1024):
        query_bytes = length * 4 * 64 * 4
        assert query_bytes <= largest_tensor(Request(0, length)) <= query_bytes + 8 * (1 << 16)
