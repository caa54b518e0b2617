"""The window as a companion cache layer: a ring of blocks per request.

Built on vLLM's ``CircularBufferSpec`` (one block per request, not prefix-cacheable, no slot
mapping), spread over m blocks that a request claims with its first allocation and holds to its
end. New ring blocks arrive zeroed, so a position tag of an earlier request never matches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_sparsekv.engine.compat import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayerBase,
    AttentionMetadataBuilder,
    CircularBufferManager,
    CircularBufferSpec,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    VllmConfig,
)
from vllm_sparsekv.format.layout import BLOCK_SIZE_MULTIPLE, SparseFormat


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """A ring of at least ``min_slots`` slots a request, in blocks of the size of sparse pages.

    Attributes:
        block_size: N, tokens of a sparse page; a block of the ring has as many bytes.
        token_bytes: bytes of a token in one KV head of a sparse page.
        min_slots: slots a request needs.
    """

    token_bytes: int
    min_slots: int

    def __post_init__(self) -> None:
        super().__post_init__()
        page = self.block_size * self.num_kv_heads * self.token_bytes
        # vLLM raises it where other layers' pages are larger.
        object.__setattr__(self, "page_size_padded", max(page, self.page_size_padded or 0))

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Slots of a block; they have nothing to do with its N tokens."""
        return self.page_size_padded // (self.num_heads * self.state_content_size_bytes)

    @property
    def blocks_per_request(self) -> int:
        return math.ceil(self.min_slots / self.num_states)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.blocks_per_request * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        if vllm_config.use_v2_model_runner:
            return self.blocks_per_request
        # Model runner V1 computes block_table[position // block_size] for every group, so its rows
        # must be long enough for that; only the first m entries mean anything.
        return max(self.blocks_per_request, math.ceil(max_len / self.block_size))


class RingManager(CircularBufferManager):
    """Claims the whole ring with a request's first allocation and has it zeroed."""

    def __init__(self, kv_cache_spec: RingSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        if not kwargs.get("needs_kv_cache_zeroing"):
            raise ValueError("vLLM does not zero new blocks here, stale window slots would be read")
        # vLLM leaves circular buffers out of zeroing; the tags depend on it.
        self._record_new_block_ids = True

    def _claim_ring_block(self, request_id: str, record_for_zeroing: bool = True) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        claimed = self.block_pool.get_new_blocks(self.kv_cache_spec.blocks_per_request)
        blocks.extend(claimed)
        self.new_block_ids.extend(block.block_id for block in claimed)
        return claimed

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        if self.req_to_blocks.get(request_id):
            return 0
        return self.kv_cache_spec.blocks_per_request


@dataclass(eq=False)
class WindowMetadata:
    """One step of the window group.

    Attributes:
        block_table: (num_reqs, m) int32, ring blocks of each request.
    """

    block_table: torch.Tensor


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec: RingSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> WindowMetadata:
        blocks = self.kv_cache_spec.blocks_per_request
        return WindowMetadata(common_attn_metadata.block_table_tensor[:, :blocks])


class WindowBackend(AttentionBackend):
    """Storage only: the sparse layer reads and writes the ring."""

    @staticmethod
    def get_name() -> str:
        return "SPARSEKV_WINDOW"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise NotImplementedError("the window has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class WindowLayer(torch.nn.Module, AttentionLayerBase):
    """The ring of one attention layer, as vLLM sees it.

    Args:
        name: layer name; holds exactly one integer, the global layer index.
        num_kv_heads: KV heads on this rank.
        fmt: the cache format.

    Attributes:
        kv_cache: (num_blocks, num_kv_heads, r, slot elements) window dtype, bound by vLLM.
    """

    def __init__(self, name: str, num_kv_heads: int, fmt: SparseFormat) -> None:
        super().__init__()
        self.layer_name = name
        self.num_kv_heads = num_kv_heads
        self.format = fmt
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RingSpec:
        return RingSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.format.head_size,
            dtype=self.format.window_dtype,
            state_content_bytes=self.format.slot_bytes,
            token_bytes=self.format.token_bytes,
            min_slots=self.format.min_ring_slots,
            dcp_sharded=False,
        )

    def zero_blocks(self, blocks: list[int]) -> None:
        """Forget what the ring's blocks hold."""
        self.format.slots(self.kv_cache).tag[blocks] = 0
