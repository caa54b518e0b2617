"""Ragged paged batches in poisoned memory, for the tests of every implementation of the kernels.

:func:`build_case` writes the history of a batch with the given implementation and returns the
arguments of its attention step; ``Case.expected`` is the float64 answer of :mod:`oracle`. What no
request owns is poison: 0xFF in pages (NaN in every codec) and in windows of int8, NaN in other
windows, in padding tokens and in ring slots that hold nothing a query may read. The cases every
implementation must pass are in :mod:`ragged`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from oracle import as_read, dense_attention

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention import reference as attention_reference
from vllm_sparsekv.kernels.pack import reference as pack_reference
from vllm_sparsekv.kernels.window import reference as window_reference
from vllm_sparsekv.settings import SparseKVConfig

UNWRITTEN = 12345.0
"""What ``out`` holds before attention runs; exact in fp32, far from any answer in every dtype."""


class Ops(NamedTuple):
    """One implementation, signatures as in the ``reference.py`` of each kernel."""

    pack: Callable[..., None]
    sparse_attention: Callable[..., None]
    write_window: Callable[..., None]


REFERENCE = Ops(
    pack_reference.pack, attention_reference.sparse_attention, window_reference.write_window
)


class Request(NamedTuple):
    """One request of a batch.

    Attributes:
        context: tokens computed before this step.
        query: tokens of this step; 0 is an empty row.
        hit: leading context tokens found in the prefix cache: in pages, never in the ring.
    """

    context: int
    query: int
    hit: int = 0


@dataclass(frozen=True)
class CaseSpec:
    """A batch and its format; ``padding`` counts extra padding tokens in every token tensor."""

    requests: tuple[Request, ...]
    name: str = ""
    head_size: int = 64
    num_kv_heads: int = 2
    group: int = 2
    block_size: int = 64
    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    key_dtype: str = "auto"
    value_dtype: str = "auto"
    dtype: torch.dtype = torch.float32
    window: int = 64
    window_dtype: str = "auto"
    lookahead: int = 0
    padding: int = 3
    seed: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def format(self) -> SparseFormat:
        config = SparseKVConfig(
            self.key_sparsity,
            self.value_sparsity,
            self.key_dtype,
            self.value_dtype,
            self.window,
            self.window_dtype,
            basis="any" if CODECS[self.key_dtype].bands > 1 else "none",
        )
        return SparseFormat.from_config(config, self.head_size, self.dtype, self.lookahead)

    @property
    def history_tokens(self) -> int:
        """Context tokens of the whole batch."""
        return sum(request.context for request in self.requests)

    @property
    def tokens(self) -> int:
        """Of history and step, of the whole batch: what a slow interpreter pays for."""
        return self.history_tokens + sum(request.query for request in self.requests)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-D{self.head_size}-G{self.group}-N{self.block_size}-W{self.window}"
            f"{self.window_dtype.removeprefix('auto')}+{self.lookahead}"
            f"-K{self.key_sparsity}{self.key_dtype}"
            f"-V{self.value_sparsity}{self.value_dtype}-{dtype}"
            f"{f'-SW{self.sliding_window}' if self.sliding_window else ''}"
            f"{f'-cap{self.soft_cap}' if self.soft_cap else ''}{'-sinks' if self.sinks else ''}"
        )


@dataclass(frozen=True, eq=False)
class Case:
    """One attention step, ready to run; tensors as in ``kernels/attention/reference.py``.

    Attributes:
        keys: per request (context + query, num_kv_heads, D), every key unpruned, on the CPU.
        values: the same for values.
        slot_mapping: (num_tokens,) int64 of this step, -1 for the padding tokens. The step is not
            packed: its places in the pages are poison, as attention must not read them.
    """

    spec: CaseSpec
    fmt: SparseFormat
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pages: torch.Tensor
    window: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    window_block_table: torch.Tensor | None
    scale: float
    sinks: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        """Tokens of this step without padding."""
        return int(self.query_start_loc[-1])

    def attention_args(self) -> tuple[Any, ...]:
        """Arguments of ``sparse_attention`` up to ``out``."""
        return (
            self.query,
            self.key,
            self.value,
            self.pages,
            self.window,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.window_block_table,
            self.scale,
            self.fmt,
        )

    def attention_options(self) -> dict[str, Any]:
        """Keyword arguments of ``sparse_attention``."""
        return {
            "sliding_window": self.spec.sliding_window,
            "soft_cap": self.spec.soft_cap,
            "sinks": self.sinks,
        }

    def attend(self, ops: Ops = REFERENCE) -> torch.Tensor:
        """Run the step: (num_tokens, num_heads, D). No padding row of ``out`` may be written."""
        out = torch.full_like(self.query, UNWRITTEN)
        untouched = out[self.num_tokens :].clone()
        ops.sparse_attention(*self.attention_args(), out, **self.attention_options())
        assert torch.equal(out[self.num_tokens :], untouched), "a padding row was written"
        return out[: self.num_tokens]

    def write_step(self, ops: Ops = REFERENCE) -> None:
        """What the backend does around attention: pack the step and put it into the window."""
        ops.pack(self.key, self.value, self.slot_mapping, self.pages, self.fmt)
        self.write_window(ops)

    def step(self, ops: Ops, out: torch.Tensor) -> None:
        """A layer's whole step, in the order of the backend."""
        ops.pack(self.key, self.value, self.slot_mapping, self.pages, self.fmt)
        ops.sparse_attention(*self.attention_args(), out)
        self.write_window(ops)

    def write_window(self, ops: Ops) -> None:
        if self.window is not None:
            ops.write_window(
                self.key,
                self.value,
                self.window,
                self.query_start_loc,
                self.seq_lens,
                self.slot_mapping,
                self.window_block_table,
                self.fmt,
            )

    @cached_property
    def expected(self) -> torch.Tensor:
        """(num_tokens, num_heads, D) float64 on the CPU: the attention rule, densely."""
        rows = [torch.empty(0, *self.query.shape[1:], dtype=torch.float64)]
        start = 0
        for request, key, value in zip(self.spec.requests, self.keys, self.values, strict=True):
            query = self.query[start : start + request.query].cpu()
            held = max(request.context - self.spec.window, request.hit), request.context
            start += request.query
            rows.append(
                dense_attention(
                    query,
                    as_read(key, self.fmt.key, *held, self.spec.window_dtype),
                    as_read(value, self.fmt.value, *held, self.spec.window_dtype),
                    self.scale,
                    self.spec.sliding_window,
                    self.spec.soft_cap,
                    None if self.sinks is None else self.sinks.cpu(),
                )
            )
        return torch.cat(rows)


def build_case(spec: CaseSpec, ops: Ops = REFERENCE, device: torch.device | str = "cpu") -> Case:
    """Write the batch's history with ``ops`` and return its attention step.

    The same ``spec`` gives the same tensors for every implementation and device, so pages and
    windows of two implementations can be compared byte for byte.
    """
    fmt, size = spec.format, spec.block_size
    generator = torch.Generator().manual_seed(spec.seed)
    lengths = [request.context + request.query for request in spec.requests]
    heads = (spec.num_kv_heads, spec.head_size)
    keys = [torch.randn(n, *heads, generator=generator).to(spec.dtype) for n in lengths]
    values = [torch.randn(n, *heads, generator=generator).to(spec.dtype) for n in lengths]

    # Request by request random blocks of one pool; block 0 is the null block, two stay unused.
    slots_per_block = fmt.slots_per_block(size) if spec.window else 0
    ring_blocks = fmt.blocks_per_ring(slots_per_block) if spec.window else 0
    page_blocks = [-(-n // size) for n in lengths]
    num_blocks = 3 + sum(page_blocks) + ring_blocks * len(lengths)
    free = iter((torch.randperm(num_blocks - 1, generator=generator) + 1).tolist())
    # A table row ends in whatever was there before.
    block_table = torch.randint(
        num_blocks, (len(lengths), max(page_blocks, default=0) + 1), generator=generator
    ).int()
    window_block_table = torch.zeros(len(lengths), ring_blocks, dtype=torch.int32)
    for row, count in enumerate(page_blocks):
        block_table[row, :count] = torch.tensor(list(itertools.islice(free, count)))
        if lengths[row]:
            window_block_table[row] = torch.tensor(list(itertools.islice(free, ring_blocks)))

    pages = torch.full(
        (num_blocks, spec.num_kv_heads, size, fmt.token_bytes), 0xFF, dtype=torch.uint8
    ).to(device)
    _pack_history(spec, ops, keys, values, block_table, pages, generator)
    window = None
    if spec.window:
        shape = (num_blocks, spec.num_kv_heads, slots_per_block, fmt.slot_elements)
        window = poisoned(shape, fmt.window_dtype)
        fmt.slots(window).tag[window_block_table[window_block_table > 0].long()] = 0
        window = window.to(device)
        _write_history_window(spec, ops, keys, values, block_table, window, window_block_table)
        _leave_stale_slots(spec, window, window_block_table)
    if spec.sliding_window is not None:
        _free_blocks(spec, block_table, pages)

    step_keys = [key[r.context :] for key, r in zip(keys, spec.requests, strict=True)]
    step_values = [value[r.context :] for value, r in zip(values, spec.requests, strict=True)]
    num_tokens = sum(request.query for request in spec.requests)
    query = torch.randn(num_tokens, heads[0] * spec.group, heads[1], generator=generator)
    slots = _slots(block_table, [(r.context, r.context + r.query) for r in spec.requests], size)
    sinks = 2 * torch.randn(heads[0] * spec.group, generator=generator).to(spec.dtype)
    return Case(
        spec=spec,
        fmt=fmt,
        keys=keys,
        values=values,
        query=_padded([query.to(spec.dtype)], spec.padding).to(device),
        key=_padded([_no_tokens(spec), *step_keys], spec.padding).to(device),
        value=_padded([_no_tokens(spec), *step_values], spec.padding).to(device),
        pages=pages,
        window=window,
        query_start_loc=_starts([request.query for request in spec.requests]).to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).to(device),
        slot_mapping=torch.cat([slots, torch.full((spec.padding,), -1)]).to(device),
        block_table=block_table.to(device),
        window_block_table=window_block_table.to(device) if spec.window else None,
        scale=spec.head_size**-0.5,
        sinks=sinks.to(device) if spec.sinks else None,
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A window of NaN; one of int8 is all bits, which are NaN where a step is read."""
    return torch.full(shape, -1 if dtype == torch.int8 else torch.nan, dtype=dtype)


def _pack_history(
    spec: CaseSpec,
    ops: Ops,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    block_table: torch.Tensor,
    pages: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """One call for all contexts, in random order, padding tokens among and after the real ones."""
    contexts = [request.context for request in spec.requests]
    slots = _slots(block_table, [(0, context) for context in contexts], spec.block_size)
    slots = torch.cat([slots, torch.full((spec.padding,), -1)])
    order = torch.randperm(len(slots), generator=generator)

    def tokens(vectors: list[torch.Tensor]) -> torch.Tensor:
        flat = [x[:context] for x, context in zip(vectors, contexts, strict=True)]
        flat = _padded([_no_tokens(spec), *flat], spec.padding)[order]
        return _padded([flat], spec.padding).to(pages.device)

    ops.pack(tokens(keys), tokens(values), slots[order].to(pages.device), pages, spec.format)


def _free_blocks(spec: CaseSpec, block_table: torch.Tensor, pages: torch.Tensor) -> None:
    """Poison what a sliding window has passed; the table names the null block or the old one."""
    size = spec.block_size
    sections = spec.format.sections(pages)
    for row, request in enumerate(spec.requests):
        passed = torch.arange(max(0, request.context - spec.sliding_window + 1))
        block = block_table[row, passed // size].long().to(pages.device)
        for section in sections:
            section[block, :, (passed % size).to(pages.device)] = 0xFF
        block_table[row, : len(passed) // size : 2] = 0


def _write_history_window(
    spec: CaseSpec,
    ops: Ops,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    block_table: torch.Tensor,
    window: torch.Tensor,
    window_block_table: torch.Tensor,
) -> None:
    """One call for all contexts, from each request's prefix-cache hit on."""
    device = window.device
    spans = [(request.hit, request.context) for request in spec.requests]
    slots = _slots(block_table, spans, spec.block_size)

    def tokens(vectors: list[torch.Tensor]) -> torch.Tensor:
        flat = [x[start:end] for x, (start, end) in zip(vectors, spans, strict=True)]
        return _padded([_no_tokens(spec), *flat], spec.padding).to(device)

    ops.write_window(
        tokens(keys),
        tokens(values),
        window,
        _starts([end - start for start, end in spans]).to(device),
        torch.tensor([end for _, end in spans], dtype=torch.int32).to(device),
        torch.cat([slots, torch.full((spec.padding,), -1)]).to(device),
        window_block_table.to(device),
        spec.format,
    )


def _leave_stale_slots(
    spec: CaseSpec, window: torch.Tensor, window_block_table: torch.Tensor
) -> None:
    """Poison the slots a query must not read, most of them under a tag that tempts it to."""
    slots_per_block = window.shape[2]
    ring = window_block_table.shape[1] * slots_per_block
    slots = spec.format.slots(window)
    for row, request in enumerate(spec.requests):
        if request.context + request.query == 0:
            continue
        held_from = max(0, request.hit, request.context - spec.window)
        held = {position % ring for position in range(held_from, request.context)}
        stale = [slot for slot in range(ring) if slot not in held]
        tags = [_stale_tag(request, spec.window, ring, slot, row + slot) for slot in stale]
        place = torch.tensor(stale, dtype=torch.long)
        block = window_block_table[row, place // slots_per_block].long().to(window.device)
        slot = (place % slots_per_block).to(window.device)
        for view in (slots.key, slots.value, slots.key_step, slots.value_step):
            if view is not None and view.is_floating_point():
                view[block, :, slot] = torch.nan
        slots.tag[block, :, slot] = torch.tensor(tags, dtype=torch.int32, device=window.device)[
            :, None
        ]


def _stale_tag(request: Request, window: int, ring: int, slot: int, choice: int) -> int:
    """A tag that must not be believed: before the window, not yet computed, in another's slot."""
    oldest = request.context - window
    before = oldest - 1 - (oldest - 1 - slot) % ring
    ahead = request.context + (slot - request.context) % ring
    newest = request.context - 1
    misplaced = newest if newest % ring != slot else -1
    return max(0, (before, ahead, misplaced, -1)[choice % 4] + 1)


def _slots(
    block_table: torch.Tensor, spans: list[tuple[int, int]], block_size: int
) -> torch.Tensor:
    """Slot of every position of ``spans``, request after request, int64."""
    parts = [torch.empty(0, dtype=torch.long)]
    for row, (start, end) in enumerate(spans):
        position = torch.arange(start, end)
        block = block_table[row, position // block_size].long()
        parts.append(block * block_size + position % block_size)
    return torch.cat(parts)


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def _no_tokens(spec: CaseSpec) -> torch.Tensor:
    return torch.empty(0, spec.num_kv_heads, spec.head_size, dtype=spec.dtype)


def _padded(parts: list[torch.Tensor], padding: int) -> torch.Tensor:
    """One tensor with ``padding`` NaN tokens at its end."""
    end = torch.full((padding, *parts[0].shape[1:]), torch.nan, dtype=parts[0].dtype)
    return torch.cat([*parts, end])
