"""Prune, pack and unpack in plain torch (per-token magnitude, Mustafar, arXiv 2505.22913)."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import embedding, pad

from vllm_sparsekv.format.codecs import IntegerCodec
from vllm_sparsekv.format.layout import SparseFormat, VectorFormat


def survivor_mask(x: torch.Tensor, survivors: int) -> torch.Tensor:
    """Which elements of each vector survive: exactly k, largest |x|, ties to the lower index.

    Magnitudes are compared as bit patterns, so Inf beats every number and NaN beats Inf.

    Args:
        x: (..., D) floats; of NaNs all bits count, so let them be the same.
        survivors: k, 0 < k <= D.

    Returns:
        (..., D) bool with k True per vector.
    """
    size = x.shape[-1]
    integer = {2: torch.int16, 4: torch.int32}[x.dtype.itemsize]
    magnitude = x.abs().contiguous().view(integer).long()
    rank = magnitude * size + torch.arange(size - 1, -1, -1, device=x.device)
    kept = rank.topk(survivors, dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, kept, True)


def pack_vectors(
    x: torch.Tensor, fmt: VectorFormat, feedback: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune and encode vectors.

    Args:
        x: (..., D) floats; a surviving -0.0 is stored as 0, and there is but one NaN.
        fmt: format of these vectors.
        feedback: (num_kv_heads, D, D) of whole integer vectors x (..., num_kv_heads, D), see
            :mod:`vllm_sparsekv.format.feedback`.

    Returns:
        bitmaps (..., bitmap_bytes), values (..., value_bytes) and scales (..., scale_bytes), all
        uint8.
    """
    x = x + 0.0
    # Which NaN that leaves depends on the place in torch's loops.
    x = x.masked_fill(x.isnan(), torch.nan)
    if fmt.survivors == fmt.head_size:
        if isinstance(fmt.codec, IntegerCodec):
            values, scales = fmt.codec.encode(x, feedback)
        else:
            values, scales = fmt.codec.encode(x)
        return values[..., :0], values, scales
    mask = survivor_mask(x, fmt.survivors)
    bit = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    bitmap = (mask.unflatten(-1, (-1, 8)) * bit).sum(-1, dtype=torch.uint8)
    values = x[mask].unflatten(0, (*x.shape[:-1], fmt.survivors))
    return bitmap, *fmt.codec.encode(values)


def unpack_vectors(
    bitmap: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, fmt: VectorFormat
) -> torch.Tensor:
    """Decode vectors; pruned elements are 0. The inverse of :func:`pack_vectors`.

    Args:
        bitmap: (..., bitmap_bytes) uint8.
        values: (..., value_bytes) uint8.
        scales: (..., scale_bytes) uint8.
        fmt: format of these vectors.

    Returns:
        (..., D) float32.
    """
    survivors = fmt.survivors
    if survivors == fmt.head_size:
        return fmt.codec.decode(values, scales)
    ranks, population = _byte_tables(survivors, bitmap.device)
    byte = bitmap.int()
    count = embedding(byte, population).squeeze(-1)
    before = (count.cumsum(-1) - count).unsqueeze(-1)
    # Index of each element's value; pruned elements all point behind the last one, at a zero.
    rank = embedding(byte, ranks).add_(before).clamp_max_(survivors).flatten(-2)
    return pad(fmt.codec.decode(values, scales), (0, 1)).gather(-1, rank)


@cache
def _byte_tables(survivors: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Per byte value: its bits' ranks, k where unset, (256, 8); how many are set, (256, 1)."""
    bits = torch.arange(256, device=device).unsqueeze(-1) >> torch.arange(8, device=device) & 1
    ranks = (bits.cumsum(-1) - 1).masked_fill(bits == 0, survivors)
    return ranks, bits.sum(-1, keepdim=True)


def pack(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    pages: torch.Tensor,
    fmt: SparseFormat,
    *,
    key_feedback: torch.Tensor | None = None,
    value_feedback: torch.Tensor | None = None,
) -> None:
    """Prune a step's keys and values and write them into their pages, in place.

    Args:
        key: (num_tokens, num_kv_heads, D) model dtype, after RoPE.
        value: (num_tokens, num_kv_heads, D) model dtype.
        slot_mapping: (num_slots,) int64, ``block * block_size + offset`` per token, negative for
            padding; tokens beyond ``num_slots`` are padding too.
        pages: (num_blocks, num_kv_heads, block_size, token_bytes) uint8.
        fmt: the cache format.
        key_feedback: (num_kv_heads, D, D) of whole integer keys, or None, see
            :mod:`vllm_sparsekv.format.feedback`.
        value_feedback: the same for values.
    """
    real = (slot_mapping >= 0).nonzero().squeeze(-1)
    slot = slot_mapping[real]
    block, offset = slot // pages.shape[2], slot % pages.shape[2]
    packed_key = pack_vectors(key[real], fmt.key, key_feedback)
    packed_value = pack_vectors(value[real], fmt.value, value_feedback)
    sections = fmt.sections(pages)
    for section, packed in zip(sections[0::2], packed_key, strict=True):
        section[block, :, offset] = packed
    for section, packed in zip(sections[1::2], packed_value, strict=True):
        section[block, :, offset] = packed
