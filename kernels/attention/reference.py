"""Paged attention over sparse pages in plain torch: the definition every kernel is tested against.

For a request with c tokens computed before this step and a query at position t >= c, position
j <= t contributes

- j >= c: the step's own key and value, dense;
- c - window <= j < c and the ring holds j: the whole copy in the ring;
- otherwise: the pruned vector unpacked from its page.

With a sliding window of w only positions j > t - w contribute; nothing that no query sees is read,
its blocks may belong to another request by now. A score is ``scale * q . k``, with a soft cap c
``c * tanh(scale * q . k / c)`` (Gemma 2, arXiv 2408.00118). A sink is one more logit of each head,
of a token whose value is 0 (gpt-oss, arXiv 2508.10925).

One softmax runs over all of them, in float32, accumulated online tile by tile so that memory does
not grow with the length of the history.
"""

from __future__ import annotations

import torch

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.format.window import from_int8
from vllm_sparsekv.kernels.pack.reference import unpack_vectors

TILE_ELEMENTS = 1 << 22
"""Unpacked or score elements held at once, the bound on working memory."""


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    window: torch.Tensor | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    window_block_table: torch.Tensor | None,
    scale: float,
    fmt: SparseFormat,
    out: torch.Tensor,
    *,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Causal attention of a ragged batch, written into ``out``.

    Args:
        query: (num_tokens, num_heads, D) model dtype.
        key: (num_tokens, num_kv_heads, D) model dtype, this step's, after RoPE.
        value: (num_tokens, num_kv_heads, D) model dtype, this step's.
        pages: (num_blocks, num_kv_heads, block_size, token_bytes) uint8.
        window: (num_blocks, num_kv_heads, r, slot elements) of the format's window dtype,
            or None when ``fmt.window`` is 0.
        query_start_loc: (num_reqs + 1,) int32, first token of each request in this step.
        seq_lens: (num_reqs,) int32, tokens of each request including this step's.
        block_table: (num_reqs, max_blocks) int32, page of each block of tokens.
        window_block_table: (num_reqs, m) int32, ring blocks of each request, or None.
        scale: factor on q . k before the softmax.
        fmt: the cache format.
        out: (num_tokens, num_heads, D), written for the tokens of the requests only.
        sliding_window: newest positions a query sees, its own included, >= 1; None for all.
        soft_cap: bound of scores, > 0; None for none.
        sinks: (num_heads,) float, a logit each in the softmax's denominator, or None.
    """
    query_lens = query_start_loc.diff()
    for query_len in query_lens.unique().tolist():
        if query_len == 0:
            continue
        requests = (query_lens == query_len).nonzero().squeeze(-1)
        tokens = query_start_loc[requests, None].long() + torch.arange(
            query_len, device=query.device
        )
        context_lens = seq_lens[requests].long() - query_len
        softmax = _OnlineSoftmax(
            query[tokens], key.shape[1], context_lens, scale, sliding_window, soft_cap
        )
        tags = None
        if window is not None:
            tags = _attend_window(
                softmax, window, window_block_table[requests].long(), context_lens, fmt
            )
        _attend_pages(softmax, pages, tags, block_table[requests].long(), context_lens, fmt)
        _attend_step(softmax, key[tokens], value[tokens])
        if sinks is not None:
            softmax.add_sinks(sinks)
        out[tokens] = softmax.output().to(out.dtype)


class _OnlineSoftmax:
    """Softmax-weighted sum of values over tiles of keys, for R requests of L queries each.

    Args:
        query: (R, L, num_heads, D).
        num_kv_heads: H; query head h reads KV head ``h // (num_heads // H)`` (GQA).
        context_lens: (R,) int64, the position of each request's first query.
        scale, sliding_window, soft_cap: as of :func:`sparse_attention`.
    """

    def __init__(
        self,
        query: torch.Tensor,
        num_kv_heads: int,
        context_lens: torch.Tensor,
        scale: float,
        sliding_window: int | None,
        soft_cap: float | None,
    ) -> None:
        requests, length, _, size = query.shape
        self.context = context_lens
        self.sliding_window = sliding_window
        self.soft_cap = soft_cap
        grouped = query.float().unflatten(2, (num_kv_heads, -1)) * scale
        # (R, H, L * G, D): the queries that share a KV head are rows of one matrix product.
        self.query = grouped.transpose(1, 2).reshape(requests, num_kv_heads, -1, size)
        self.length = length
        self.maximum = self.query.new_full(self.query.shape[:3], -torch.inf)
        self.total = torch.zeros_like(self.maximum)
        self.weighted = torch.zeros_like(self.query)

    def first_visible(self) -> torch.Tensor:
        """(R,) int64, the first position that any query of each request sees."""
        if self.sliding_window is None:
            return torch.zeros_like(self.context)
        return (self.context - self.sliding_window + 1).clamp_min(0)

    def add(
        self, key: torch.Tensor, value: torch.Tensor, position: torch.Tensor, there: torch.Tensor
    ) -> None:
        """Fold in n keys and values; each query takes those up to its own position.

        Args:
            key: (R, H, n, D) float32.
            value: (R, H, n, D) float32; zeros where not ``there``.
            position: int64, broadcastable to (R, H, n).
            there: bool, likewise; the others are not folded in.
        """
        n = key.shape[2]
        scores = (self.query @ key.mT).unflatten(2, (self.length, -1))
        if self.soft_cap is not None:
            scores = self.soft_cap * (scores / self.soft_cap).tanh()
        place = torch.arange(self.length, device=key.device) + self.context[:, None]
        ahead = place[:, None, :, None] - position.unsqueeze(-2)
        visible = there.unsqueeze(-2) & (ahead >= 0)
        if self.sliding_window is not None:
            visible &= ahead < self.sliding_window
        scores = scores.masked_fill(~visible.unsqueeze(-2), -torch.inf).flatten(2, 3)
        maximum = torch.maximum(self.maximum, scores.amax(-1)) if n else self.maximum
        shift = maximum.masked_fill(maximum == -torch.inf, 0)
        weights = (scores - shift.unsqueeze(-1)).exp_()
        correction = (self.maximum - shift).exp_()
        self.total = self.total * correction + weights.sum(-1)
        self.weighted = self.weighted * correction.unsqueeze(-1) + weights @ value
        self.maximum = maximum

    def add_sinks(self, sinks: torch.Tensor) -> None:
        """Fold in one key a head, of score ``sinks`` (num_heads,) and value 0."""
        heads = sinks.float().view(self.query.shape[1], 1, -1)
        score = heads.expand(-1, self.length, -1).flatten(1)
        maximum = torch.maximum(self.maximum, score)
        correction = (self.maximum - maximum).exp_()
        self.total = self.total * correction + (score - maximum).exp_()
        self.weighted = self.weighted * correction.unsqueeze(-1)
        self.maximum = maximum

    def output(self) -> torch.Tensor:
        """(R, L, num_heads, D) float32."""
        result = self.weighted / self.total.unsqueeze(-1)
        return result.unflatten(2, (self.length, -1)).transpose(1, 2).flatten(2, 3)


def _attend_window(
    softmax: _OnlineSoftmax,
    window: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    fmt: SparseFormat,
) -> torch.Tensor:
    """Fold in the ring; returns its usable tags (R, H, ring), 0 where a slot is not usable."""
    slots = fmt.slots(window)
    # Blocks (R, m, H, r, ...) to one ring (R, H, m * r, ...).
    key, value, tag, key_step, value_step = (
        None if slot is None else slot[block_table].transpose(1, 2).flatten(2, 3) for slot in slots
    )
    position = tag.long() - 1
    context = context_lens[:, None, None]
    in_window = (position >= context - fmt.window) & (position >= 0) & (position < context)
    in_place = position % tag.shape[-1] == torch.arange(tag.shape[-1], device=tag.device)
    usable = in_window & in_place
    if key_step is not None:
        key, value = from_int8(key, key_step), from_int8(value, value_step)
    softmax.add(key.float(), value.float().masked_fill(~usable.unsqueeze(-1), 0), position, usable)
    return tag.long() * usable


def _attend_pages(
    softmax: _OnlineSoftmax,
    pages: torch.Tensor,
    tags: torch.Tensor | None,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    fmt: SparseFormat,
) -> None:
    """Fold in the pruned history, a bounded number of blocks at a time."""
    block_size = pages.shape[2]
    num_blocks = -(-int(context_lens.max()) // block_size)
    first_visible = softmax.first_visible()
    requests, heads, rows, size = softmax.query.shape
    step = max(1, TILE_ELEMENTS // (requests * heads * block_size * max(rows, size)))
    for start in range(int(first_visible.min()) // block_size, num_blocks, step):
        blocks = block_table[:, start : min(start + step, num_blocks)]
        position = start * block_size + torch.arange(
            blocks.shape[1] * block_size, device=pages.device
        )
        stored = (position < context_lens[:, None]) & (position >= first_visible[:, None])
        stored = stored[:, None]
        if tags is not None:
            stored = stored & (tags[..., position % tags.shape[-1]] != position + 1)
        sections = fmt.sections(pages.index_select(0, blocks.flatten()))
        # Blocks (R * n, H, N, ...) to one run of tokens (R, H, n * N, ...).
        tile = [s.unflatten(0, blocks.shape).transpose(1, 2).flatten(2, 3) for s in sections]
        bitmap, values, scales = tile[0::2]
        key = unpack_vectors(bitmap, values, scales, fmt.key)
        # Whatever lies in memory no token was written to: its score is masked, its value zero.
        used = stored.unsqueeze(-1).byte()
        bitmap, values, scales = (section * used for section in tile[1::2])
        value = unpack_vectors(bitmap, values, scales, fmt.value)
        softmax.add(key, value, position, stored)


def _attend_step(softmax: _OnlineSoftmax, key: torch.Tensor, value: torch.Tensor) -> None:
    """Fold in the step's own tokens (R, L, H, D), causally."""
    requests, length, heads, _ = key.shape
    key, value = key.float().transpose(1, 2), value.float().transpose(1, 2)
    position = torch.arange(length, device=key.device) + softmax.context[:, None]
    position = position[:, None]
    there = torch.ones_like(position, dtype=torch.bool)
    step = max(1, TILE_ELEMENTS // (requests * heads * softmax.query.shape[2]))
    for start in range(0, length, step):
        tile = slice(start, start + step)
        softmax.add(key[:, :, tile], value[:, :, tile], position[..., tile], there[..., tile])
