"""Ragged paged batches in poisoned memory: what a history leaves behind, and the step after it.

What no request owns is poison: 0xFF in pages (NaN in every codec) and in windows of int8, NaN in
other windows, in padding tokens and in ring slots that hold nothing a query may read.
"""

from __future__ import annotations

import itertools

import torch
from helpers import REFERENCE, Case, CaseSpec, Ops, Request


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
