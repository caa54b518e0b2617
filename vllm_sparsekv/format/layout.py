"""The byte layout of a sparse page; every size derives from here.

A vLLM block of N tokens holds one contiguous *tile* per KV head (cache layout ``LBHNC``). A tile
keeps the six sections of all its tokens one after the other, N entries each (D = head_size, k =
survivors, b = bits of the codec, s = scale bytes of the codec; K and V have their own k, b, s)::

    +-----------+-----------+------------+------------+----------+----------+
    | K bitmaps | V bitmaps | K values   | V values   | K scales | V scales |
    | N * D/8   | N * D/8   | N * kK*b/8 | N * kV*b/8 | N * sK   | N * sV   |
    +-----------+-----------+------------+------------+----------+----------+

N is a multiple of 16, so every section starts at a multiple of 16 bytes. Bit ``i % 8`` of bitmap
byte ``i // 8`` is set when element i of the vector survived; the values follow in element order.
Vectors that keep all their elements (k = D) have no bitmap: its section is 0 bytes wide. Every
vector costs the same bytes, so a page is complete once written and needs no offsets.

The newest tokens are whole as well, see :mod:`vllm_sparsekv.format.window`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vllm_sparsekv.format.codecs import CODECS, Codec
from vllm_sparsekv.format.window import TAG_BYTES, WindowSlots
from vllm_sparsekv.settings import SparseKVConfig

BLOCK_SIZE_MULTIPLE = 16
DEFAULT_BLOCK_SIZES = (64, 96, 128)
"""Tokens; small enough for prefix caching to share most of a prompt."""
MAX_RING_TAIL = 0.06
"""Of a default block's bytes, over those of the window slots that fit into it."""
MODEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class VectorFormat:
    """One key or value vector of one token and KV head.

    Attributes:
        head_size: D, elements before pruning.
        survivors: k, elements kept, a multiple of 4.
        codec: how the survivors are stored.
    """

    head_size: int
    survivors: int
    codec: Codec

    @classmethod
    def from_sparsity(cls, head_size: int, sparsity: float, codec: Codec) -> VectorFormat:
        """Round the survivors of ``sparsity`` up to a multiple of 4."""
        return cls(head_size, 4 * math.ceil(_kept(head_size, sparsity) / 4), codec)

    @property
    def sparsity(self) -> float:
        """Effective sparsity, after rounding."""
        return 1 - self.survivors / self.head_size

    @property
    def rotated(self) -> bool:
        """Whether these vectors are stored in the basis of :mod:`vllm_sparsekv.format.basis`."""
        return self.survivors == self.head_size and self.codec.integer

    @property
    def bitmap_bytes(self) -> int:
        """0 where every element survives."""
        return self.head_size // 8 if self.survivors < self.head_size else 0

    @property
    def value_bytes(self) -> int:
        return self.survivors * self.codec.bits // 8

    @property
    def scale_bytes(self) -> int:
        return self.codec.scale_bytes

    @property
    def num_bytes(self) -> int:
        return self.bitmap_bytes + self.value_bytes + self.scale_bytes


def _kept(head_size: int, sparsity: float) -> float:
    """Elements ``sparsity`` asks to keep; 0.7 of 80 is 24, not 24 and a rounding error."""
    return round(head_size * (1 - sparsity), 6)


class PageSections(NamedTuple):
    """Views into pages, uint8, each (num_blocks, num_kv_heads, block_size, section width)."""

    key_bitmap: torch.Tensor
    value_bitmap: torch.Tensor
    key_values: torch.Tensor
    value_values: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True)
class SparseFormat:
    """The whole cache format of one attention layer.

    Attributes:
        key: format of key vectors.
        value: format of value vectors.
        dtype: model dtype.
        window: newest tokens of a request that stay whole; 0 means no window.
        window_dtype: of their elements, the model dtype or int8.
        lookahead: tokens a step may write beyond the accepted ones (speculative decoding).
    """

    key: VectorFormat
    value: VectorFormat
    dtype: torch.dtype
    window: int
    window_dtype: torch.dtype
    lookahead: int = 0

    @classmethod
    def from_config(
        cls, config: SparseKVConfig, head_size: int, dtype: torch.dtype, lookahead: int = 0
    ) -> SparseFormat:
        """Derive the format for one layer.

        Raises:
            ValueError: head_size not a multiple of 16 (of 32 with two bands), dtype not a model
                dtype, or a sparsity that leaves fewer than 4 survivors.
        """
        if head_size <= 0 or head_size % 16:
            raise ValueError(f"head_size={head_size}: must be a positive multiple of 16")
        if head_size % (16 * CODECS[config.key_dtype].bands):
            raise ValueError(
                f"sparsekv.key_dtype={config.key_dtype!r}: must be another one for "
                f"head_size={head_size}, which is no multiple of 32"
            )
        if dtype not in MODEL_DTYPES:
            raise ValueError(f"dtype={dtype}: must be one of {list(MODEL_DTYPES)}")
        for name in ("key_sparsity", "value_sparsity"):
            sparsity = getattr(config, name)
            if _kept(head_size, sparsity) < 4:
                largest = math.floor((1 - 4 / head_size) * 1e4) / 1e4
                raise ValueError(
                    f"sparsekv.{name}={sparsity}: leaves fewer than 4 of {head_size} elements, "
                    f"must be <= {largest} for head_size {head_size}"
                )
        return cls(
            key=VectorFormat.from_sparsity(
                head_size, config.key_sparsity, CODECS[config.key_dtype](dtype)
            ),
            value=VectorFormat.from_sparsity(
                head_size, config.value_sparsity, CODECS[config.value_dtype](dtype)
            ),
            dtype=dtype,
            window=config.window,
            window_dtype=torch.int8 if config.window_dtype == "int8" else dtype,
            lookahead=lookahead,
        )

    @property
    def head_size(self) -> int:
        return self.key.head_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return self.key.num_bytes + self.value.num_bytes

    @property
    def dense_token_bytes(self) -> int:
        """The same, unpruned in the model dtype."""
        return 2 * self.head_size * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of one window slot in one KV head."""
        return 2 * self.head_size * self.window_dtype.itemsize + TAG_BYTES

    @property
    def slot_elements(self) -> int:
        """The same in elements of :attr:`window_dtype`."""
        return self.slot_bytes // self.window_dtype.itemsize

    @property
    def min_ring_slots(self) -> int:
        """Slots the ring must have so that a step never overwrites a token its window needs."""
        if self.window == 0:
            return 0
        return self.window + (self.lookahead + 1 if self.lookahead else 0)

    @property
    def default_block_size(self) -> int:
        """N where the user names none: the smallest whose page has little room left by slots."""

        def tail(block_size: int) -> float:
            page = block_size * self.token_bytes
            slots = page // self.slot_bytes
            return page / (slots * self.slot_bytes) - 1 if slots else math.inf

        fitting = [size for size in DEFAULT_BLOCK_SIZES if tail(size) <= MAX_RING_TAIL]
        return fitting[0] if fitting and self.window else DEFAULT_BLOCK_SIZES[0]

    def slots_per_block(self, block_size: int) -> int:
        """r: window slots in one block, as many as its page has room for.

        Args:
            block_size: N, tokens of a sparse page.

        Raises:
            ValueError: block_size is not a multiple of 16 or its page cannot hold one slot.
        """
        if block_size <= 0 or block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block_size={block_size}: must be a positive multiple of {BLOCK_SIZE_MULTIPLE}"
            )
        slots = block_size * self.token_bytes // self.slot_bytes
        if slots == 0:
            smallest = math.ceil(self.slot_bytes / self.token_bytes / BLOCK_SIZE_MULTIPLE)
            raise ValueError(
                f"block_size={block_size}: a page of {block_size} tokens x {self.token_bytes} "
                f"bytes cannot hold one window slot of {self.slot_bytes} bytes, "
                f"must be >= {smallest * BLOCK_SIZE_MULTIPLE}"
            )
        return slots

    def blocks_per_ring(self, slots_per_block: int) -> int:
        """m: window blocks one request holds."""
        return math.ceil(self.min_ring_slots / slots_per_block)

    def with_full_ring(self, block_size: int) -> SparseFormat:
        """The same with the longest window that takes no more blocks of N tokens."""
        if self.window == 0:
            return self
        slots = self.slots_per_block(block_size)
        spare = self.blocks_per_ring(slots) * slots - self.min_ring_slots
        return replace(self, window=self.window + spare)

    def sections(self, pages: torch.Tensor) -> PageSections:
        """Split pages (num_blocks, num_kv_heads, N, token_bytes) uint8 into section views."""
        num_blocks, num_kv_heads, block_size, width = pages.shape
        if width != self.token_bytes:
            raise ValueError(f"pages hold {width} bytes a token, format has {self.token_bytes}")
        tiles = pages.view(num_blocks, num_kv_heads, block_size * width)
        widths = (
            self.key.bitmap_bytes,
            self.value.bitmap_bytes,
            self.key.value_bytes,
            self.value.value_bytes,
            self.key.scale_bytes,
            self.value.scale_bytes,
        )
        parts = tiles.split([block_size * width for width in widths], dim=-1)
        return PageSections(
            *(
                part.unflatten(-1, (block_size, width))
                for part, width in zip(parts, widths, strict=True)
            )
        )

    def slots(self, window: torch.Tensor) -> WindowSlots:
        """Split window blocks (num_blocks, num_kv_heads, r, slot elements) into slot views."""
        return WindowSlots.of(window, self.head_size)
