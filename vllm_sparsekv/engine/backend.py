"""The ``SPARSEKV`` attention backend: vLLM's interface on one side, our kernels on the other."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch

from vllm_sparsekv.engine.compat import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    layer_metadata,
    workspace,
)
from vllm_sparsekv.engine.plugin import BACKEND_NAME
from vllm_sparsekv.engine.window import WindowLayer, WindowMetadata
from vllm_sparsekv.format.basis import Basis
from vllm_sparsekv.format.layout import (
    BLOCK_SIZE_MULTIPLE,
    MODEL_DTYPES,
    SparseFormat,
)
from vllm_sparsekv.kernels import api


class SparseKVBackend(AttentionBackend):
    """What vLLM selects; every layer gets a subclass of its own format, :meth:`with_format`."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(MODEL_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]
    format: ClassVar[SparseFormat]

    @classmethod
    def with_format(cls, fmt: SparseFormat) -> type[SparseKVBackend]:
        """The backend of layers with this format."""
        return type(cls.__name__, (cls,), {"format": fmt, "__module__": cls.__module__})

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparseKVImpl]:
        return SparseKVImpl

    @staticmethod
    def get_builder_cls() -> type[SparseKVMetadataBuilder]:
        return SparseKVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return cls.format.default_block_size

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """``capability`` is None on CPUs."""
        return capability is None or capability.major >= 8

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replace the dense page by the sparse one: opaque bytes, ``token_bytes`` per state."""
        if spec.state_content_bytes is not None:
            return spec
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.format.token_bytes)


@dataclass
class SparseKVMetadata:
    """One step of the sparse group; shapes as in ``kernels/attention/reference.py``."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    batches: dict[WindowMetadata | None, api.Batch] = field(default_factory=dict)

    def batch(self, ring: WindowMetadata | None) -> api.Batch:
        """The step of the layers whose window is in this group, or that have none."""
        found = self.batches.get(ring)
        if found is None:
            tensors = (self.query_start_loc, self.seq_lens, self.block_table, self.slot_mapping)
            found = self.batches[ring] = api.Batch(*tensors, ring and ring.block_table)
        return found


class SparseKVMetadataBuilder(AttentionMetadataBuilder[SparseKVMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparseKVMetadata:
        return SparseKVMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            slot_mapping=common_attn_metadata.slot_mapping,
        )


@dataclass
class LayerCache:
    """What one layer stores, shared by the layers that read its keys and values.

    Attributes:
        format: how vectors are stored.
        basis: the basis they are stored in.
        window: the layer's ring, or None without a window.
        last_reader: name of the last layer of a step that reads this cache; it fills the window.
        step: this step's keys and values in the basis, while other layers will read them.
    """

    format: SparseFormat
    basis: Basis
    window: WindowLayer | None
    last_reader: str
    step: tuple[torch.Tensor, torch.Tensor] | None = None


class SparseKVImpl(AttentionImpl[SparseKVMetadata]):
    """Attention of one layer.

    Attributes:
        cache: set by :func:`vllm_sparsekv.engine.layers.prepare` once the model is built.
        arguments: what vLLM built this with, to build another backend's implementation.

    Raises:
        ValueError: the layer needs what sparse pages do not support; names it.
    """

    cache: LayerCache

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        sinks: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        refused = {"alibi_slopes": alibi_slopes} | options
        for name, given in refused.items():
            # Models also pass options they do not use: None, False, or -1 for no look-back.
            if given is not None and given is not False and given != -1:
                raise ValueError(f"{name}={given!r}: not supported by attention_backend=sparsekv")
        self.arguments = (
            *(num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window),
            *(kv_cache_dtype, logits_soft_cap, attn_type, kv_sharing_target_layer_name),
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or None
        self.sinks = sinks

    @property
    def takes_means(self) -> bool:
        """Whether keys and values may be stored less a mean, see :class:`Basis`."""
        return self.sinks is None and self.soft_cap is None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: SparseKVMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prune the step's keys and values into their pages, attend, then fill the window.

        Pages and window hold vectors in the basis of the layer.

        Args:
            query: (num_tokens, num_heads, head_size) model dtype.
            key: (num_tokens, num_kv_heads, head_size) model dtype, after RoPE; None in a layer that
                reads another's.
            value: (num_tokens, num_kv_heads, head_size) model dtype, or None likewise.
            kv_cache: (num_blocks, num_kv_heads, block_size, token_bytes) uint8.
            attn_metadata: None in profiling runs.
            output: (num_tokens, num_heads, head_size), written in place.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("sparsekv: fused output quantization is not supported")
        scratch = workspace(
            api.workspace_elements(
                query.device, self.num_heads // self.num_kv_heads, self.head_size
            )
        )
        if attn_metadata is None:
            return output
        cache = self.cache
        last_reader = cache.last_reader == layer.layer_name
        if key is not None and not last_reader:
            cache.step = torch.empty_like(key), torch.empty_like(value)
        window, ring = None, None
        if cache.window is not None:
            window, ring = cache.window.kv_cache, layer_metadata(cache.window.layer_name)
        api.step(
            self.attention,
            attn_metadata.batch(ring),
            query,
            key,
            value,
            kv_cache,
            window,
            output,
            kept=cache.step,
            fills_window=last_reader,
            workspace=scratch,
        )
        if last_reader:
            cache.step = None
        return output

    @cached_property
    def attention(self) -> api.Layer:
        """What the kernels need to know of this layer."""
        return api.Layer(
            self.cache.format,
            self.cache.basis,
            self.scale,
            self.sliding_window,
            self.soft_cap,
            self.sinks,
        )
