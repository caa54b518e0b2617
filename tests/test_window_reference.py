"""The ring of dense tokens: what a write leaves behind, and attention across real steps."""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bytes
from helpers import REFERENCE, Ops
from histories import build_case, poisoned
from oracle import as_read, dense_attention, in_int8
from ragged import RAGGED_MATRIX

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.window.reference import write_window
from vllm_sparsekv.settings import SparseKVConfig

pytestmark = pytest.mark.usefixtures("one_torch_thread")

D, H = 64, 2
RING_BLOCKS = ([9, 2, 7, 4, 11, 1], [3, 10, 6, 5, 8, 12])
"""Ring blocks of two requests, as many as the format asks for."""


def make_format(window: int = 24, lookahead: int = 0, codec: str = "auto") -> SparseFormat:
    config = SparseKVConfig(0.5, 0.5, codec, codec, window, "auto")
    return SparseFormat.from_config(config, D, torch.float32, lookahead)


def empty_ring(fmt: SparseFormat, r: int) -> torch.Tensor:
    """Window blocks as a request finds them, tags 0; the vectors are poison."""
    window = poisoned((13, H, r, fmt.slot_elements), fmt.window_dtype)
    fmt.slots(window).tag.zero_()
    return window


def write(window, fmt, keys, spans, m, *, slots=None, padding=0):
    """One step; ``spans`` are the (start, end) positions of each request, -1 slots are padding."""
    key = torch.cat([*(k[a:b] for k, (a, b) in zip(keys, spans, strict=True))])
    key = torch.cat([key, torch.full((padding, H, D), torch.nan)])
    lens = [b - a for a, b in spans]
    slots = torch.arange(len(key)) if slots is None else torch.tensor(slots)
    write_window(
        key,
        -key,
        window,
        torch.tensor([0, *lens]).cumsum(0).int(),
        torch.tensor([b for _, b in spans]).int(),
        slots,
        torch.tensor([blocks[:m] for blocks in RING_BLOCKS[: len(spans)]]).int(),
        fmt,
    )


def held(window, fmt, keys, row, m) -> list[int]:
    """Positions the ring of a request holds, each checked: right slot, right vectors, all heads."""
    slots = fmt.slots(window)
    r = window.shape[2]
    found = []
    for index in range(m * r):
        block, slot = RING_BLOCKS[row][index // r], index % r
        tags = slots.tag[block, :, slot].tolist()
        assert len(set(tags)) == 1
        if tags[0]:
            position = tags[0] - 1
            assert position % (m * r) == index
            assert torch.equal(slots.key[block, :, slot], keys[row][position])
            assert torch.equal(slots.value[block, :, slot], -keys[row][position])
            found.append(position)
        else:
            assert slots.key[block, :, slot].isnan().all()
    return sorted(found)


@pytest.fixture
def keys() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(200, H, D, generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("m", "r"), [(1, 32), (3, 8), (6, 4), (6, 5), (2, 16)])
@pytest.mark.parametrize("length", [1, 3, 23, 24, 31, 32, 33, 64, 65, 200])
def test_a_prompt_leaves_its_newest_tokens(keys, m, r, length):
    fmt, ring = make_format(), m * r
    window = empty_ring(fmt, r)
    write(window, fmt, keys[:1], [(0, length)], m, padding=2, slots=[*range(length), -1, -1])
    assert held(window, fmt, keys, 0, m) == list(range(max(0, length - ring), length))


@pytest.mark.parametrize("chunk", [1, 7, 31, 32, 33, 64, 100])
def test_chunks_leave_what_one_prompt_leaves(keys, chunk):
    fmt = make_format()
    expected, window = empty_ring(fmt, 8), empty_ring(fmt, 8)
    write(expected, fmt, keys[:1], [(0, 200)], 4)
    for start in range(0, 200, chunk):
        write(window, fmt, keys[:1], [(start, min(start + chunk, 200))], 4)
    assert_same_bytes(window, expected)


def test_ragged_batch_and_empty_rows(keys):
    fmt = make_format()
    window = empty_ring(fmt, 8)
    write(window, fmt, keys, [(0, 5), (0, 70)], 3)
    write(window, fmt, keys, [(5, 5), (70, 71)], 3)
    write(window, fmt, keys, [(5, 45), (71, 71)], 3)
    assert held(window, fmt, keys, 0, 3) == list(range(21, 45))
    assert held(window, fmt, keys, 1, 3) == list(range(47, 71))
    unowned = [0, *RING_BLOCKS[0][3:], *RING_BLOCKS[1][3:]]
    assert_same_bytes(window[unowned], empty_ring(fmt, 8)[unowned])


def test_after_a_prefix_hit_only_computed_tokens_are_there(keys):
    fmt = make_format()
    window = empty_ring(fmt, 8)
    write(window, fmt, keys[:1], [(64, 75)], 3)
    assert held(window, fmt, keys, 0, 3) == list(range(64, 75))


def test_tokens_without_a_slot_are_not_written(keys):
    fmt = make_format()
    window = empty_ring(fmt, 8)
    write(window, fmt, keys[:1], [(0, 6)], 3, slots=[0, -1, 2, 3, -1])
    assert held(window, fmt, keys, 0, 3) == [0, 2, 3]


def test_the_null_block_is_not_written(keys):
    """Warm-up and capture runs hand out block 0, or one ring block and then block 0."""
    fmt = make_format()
    window = empty_ring(fmt, 8)
    before = window.clone()
    args = torch.tensor([0, 20]).int(), torch.tensor([20]).int(), torch.arange(20)
    write_window(keys[0][:20], keys[0][:20], window, *args, torch.zeros(1, 3).int(), fmt)
    assert_same_bytes(window, before)
    table = torch.tensor([[9, 0, 0]]).int()
    write_window(keys[0][:20], -keys[0][:20], window, *args, table, fmt)
    assert held(window, fmt, keys, 0, 3) == list(range(8))
    assert_same_bytes(window[0], before[0])


def test_no_requests(keys):
    fmt = make_format()
    window = empty_ring(fmt, 8)
    none = torch.empty(0, H, D)
    empty = torch.empty(0, dtype=torch.int32)
    table = torch.empty(0, 3, dtype=torch.int32)
    write_window(none, none, window, torch.zeros(1).int(), empty, empty.long(), table, fmt)
    assert_same_bytes(window, empty_ring(fmt, 8))


@pytest.mark.parametrize("spec", [spec for spec in RAGGED_MATRIX if spec.window], ids=str)
def test_a_step_of_the_ragged_matrix(spec):
    """The step's newest tokens replace what their slots held; all other slots stay as they were."""
    case = build_case(spec)
    before = case.window.clone()
    case.write_step()
    slots, r = case.fmt.slots(case.window), case.window.shape[2]
    ring = case.window_block_table.shape[1] * r
    written = torch.zeros(case.window.shape[:1] + (r,), dtype=torch.bool)
    for row, (context, query, _) in enumerate(spec.requests):
        position = torch.arange(max(context, context + query - ring), context + query)
        block = case.window_block_table[row, position % ring // r].long()
        slot = position % ring % r
        written[block, slot] = True
        for given, stored, step in (
            (case.keys[row][position], slots.key, slots.key_step),
            (case.values[row][position], slots.value, slots.value_step),
        ):
            read = stored[block, :, slot].double()
            if step is None:
                assert torch.equal(read, given.double())
            else:
                assert torch.equal(read * step[block, :, slot, None].double(), in_int8(given))
        assert (slots.tag[block, :, slot] == position[:, None] + 1).all()
    untouched = ~written[:, None].expand(case.window.shape[:3])
    assert_same_bytes(case.window[untouched], before[untouched])


class Engine:
    """Steps one request the way the backend does: pack, attend, write the window."""

    def __init__(self, fmt: SparseFormat, block_size: int = 16, ops: Ops = REFERENCE) -> None:
        generator = torch.Generator().manual_seed(1)
        self.fmt, self.block_size, self.ops = fmt, block_size, ops
        self.keys, self.values, self.queries = (
            torch.randn(300, heads, D, generator=generator) for heads in (H, H, 3 * H)
        )
        self.blocks = torch.randperm(24, generator=generator).int() + 1
        self.pages = torch.full((25, H, block_size, fmt.token_bytes), 0xFF, dtype=torch.uint8)
        self.r = fmt.slots_per_block(block_size)
        self.m = fmt.blocks_per_ring(self.r)
        self.ring = torch.randperm(self.m, generator=generator).int() + 1
        self.window = torch.zeros(self.m + 1, H, self.r, fmt.slot_elements)

    def step(self, start: int, end: int, *, window_first: bool = False) -> torch.Tensor:
        """Attention of positions start to end, (end - start, 3 * H, D)."""
        position = torch.arange(start, end)
        slots = self.blocks[position // self.block_size].long() * self.block_size
        slots += position % self.block_size
        key, value = self.keys[start:end], self.values[start:end]
        query_start_loc = torch.tensor([0, end - start]).int()
        seq_lens = torch.tensor([end]).int()
        self.ops.pack(key, value, slots, self.pages, self.fmt)
        out = torch.full((end - start, 3 * H, D), torch.nan)

        def write() -> None:
            self.ops.write_window(
                key, value, self.window, query_start_loc, seq_lens, slots, self.ring[None], self.fmt
            )

        if window_first:
            write()
        self.ops.sparse_attention(
            self.queries[start:end],
            key,
            value,
            self.pages,
            self.window,
            query_start_loc,
            seq_lens,
            self.blocks[None],
            self.ring[None],
            D**-0.5,
            self.fmt,
            out,
        )
        if not window_first:
            write()
        return out

    def expected(self, start: int, end: int, hit: int = 0) -> torch.Tensor:
        held_from = max(hit, start - self.fmt.window)
        return dense_attention(
            self.queries[start:end],
            as_read(self.keys[:end], self.fmt.key, held_from, start),
            as_read(self.values[:end], self.fmt.value, held_from, start),
            D**-0.5,
        )

    def check(self, start: int, end: int, hit: int = 0) -> None:
        error = (self.step(start, end).double() - self.expected(start, end, hit)).abs().max()
        assert error <= 2e-6, f"positions {start} to {end} are off by {error:.3g}"


@pytest.mark.parametrize("codec", ["auto", "int4"])
@pytest.mark.parametrize("chunk", [5, 24, 32, 64, 100])
def test_prompt_chunks_then_decode(codec, chunk):
    """Chunks shorter than the window, of a whole ring and longer than it."""
    engine = Engine(make_format(window=24, codec=codec))
    for start in range(0, 200, chunk):
        engine.check(start, min(start + chunk, 200))
    for position in range(200, 206):
        engine.check(position, position + 1)


def test_the_window_is_written_after_attention():
    """Written before, a chunk of a ring or more wipes the window its own first queries need."""
    engine = Engine(make_format(window=24))
    ring = engine.m * engine.r
    engine.check(0, 100)
    wiped = engine.step(100, 100 + ring, window_first=True).double()
    error = (wiped - engine.expected(100, 100 + ring)).abs().amax((1, 2))
    assert error[0] > 1e-3, "this test can no longer tell the order"


def test_prefix_hit_fills_the_window_step_by_step():
    """The ring of the request that hits is new: pages hold 90 tokens, the ring none of them."""
    engine = Engine(make_format(window=24))
    engine.step(0, 90)
    engine.window.zero_()
    engine.check(90, 97, hit=90)
    for position in range(97, 120):
        engine.check(position, position + 1, hit=90)


@pytest.mark.parametrize("lookahead", [1, 3, 7])
@pytest.mark.parametrize("window", [1, 16, 24])
def test_rejected_drafts_never_cost_a_window_token(window, lookahead):
    """Every step writes lookahead + 1 tokens; the next starts after the accepted ones only."""
    engine = Engine(make_format(window, lookahead))
    engine.check(0, 50)
    position, generator = 50, torch.Generator().manual_seed(2)
    for accepted in [0, lookahead, 0, *(i % (lookahead + 1) for i in range(20))]:
        engine.check(position, position + 1 + lookahead)
        position += 1 + accepted
        # What the rejected drafts were is decided anew by the next step.
        for tensor in (engine.keys, engine.values, engine.queries):
            tensor[position:] = torch.randn(tensor[position:].shape, generator=generator)


@pytest.mark.parametrize("lookahead", [1, 3, 7])
@pytest.mark.parametrize("window", [8, 24])
@pytest.mark.parametrize("short", [0, 1])
def test_one_slot_less_than_the_drafts_need_loses_a_window_token(window, lookahead, short):
    """A format has one slot more, for the token that a draft model reads a second time."""
    fmt = make_format(window, lookahead)
    engine, slots = Engine(fmt), fmt.min_ring_slots - 1 - short
    engine.ring = torch.tensor([1]).int()
    engine.window = torch.zeros(2, H, slots, fmt.slot_elements)
    engine.step(0, 50)
    engine.step(50, 51 + lookahead)
    if not short:
        engine.check(51, 52 + lookahead)
        return
    with pytest.raises(AssertionError, match="positions 51 to"):
        engine.check(51, 52 + lookahead)


def test_zeroed_blocks_hide_the_former_owner():
    """The tags of another request's tokens match ours; only zeroing makes them go away."""
    engine = Engine(make_format(window=24))
    engine.step(0, 100)
    engine.keys, engine.values = -engine.keys, -engine.values
    engine.step(0, 80)
    engine.window.zero_()
    engine.step(60, 80)
    engine.check(80, 81, hit=60)
