"""The ``SPARSEKV`` attention backend: vLLM's interface on one side, our kernels on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vllm_sparsekv.engine.admission import layer_format, settings_of
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
    VllmConfig,
    first_layer_index,
    get_current_vllm_config,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    init_logger,
    layer_index,
    layer_metadata,
    workspace,
)
from vllm_sparsekv.engine.plugin import BACKEND_NAME
from vllm_sparsekv.engine.window import WindowLayer
from vllm_sparsekv.format.basis import Basis, LayerMatrices, change, kv_heads_of_rank
from vllm_sparsekv.format.basis_file import BasisFile
from vllm_sparsekv.format.layout import BLOCK_SIZE_MULTIPLE, MODEL_DTYPES, SparseFormat
from vllm_sparsekv.kernels import api

logger = init_logger("vllm.sparsekv")  # below "vllm", so that vLLM's handlers print it

_formats: dict[tuple[int, torch.dtype], SparseFormat] = {}
"""Format by (head_size, model dtype) of the engine whose layers were built last in this process.

vLLM asks ``customize_spec`` for the page size right after building the layers, without saying for
which engine.
"""


class SparseKVBackend(AttentionBackend):
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(MODEL_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

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
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0

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
        fmt = _formats[spec.head_size, spec.dtype]
        return replace(spec, dtype=torch.uint8, state_content_bytes=fmt.token_bytes)


@dataclass
class SparseKVMetadata:
    """One step of the sparse group; shapes as in ``kernels/attention/reference.py``."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class SparseKVMetadataBuilder(AttentionMetadataBuilder[SparseKVMetadata]):
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        logger.info_once(describe(vllm_config, kv_cache_spec))

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


def describe(vllm_config: VllmConfig, spec: AttentionSpec) -> str:
    """The start-up line."""
    asked = settings_of(vllm_config)
    fmt = layer_format(vllm_config, spec.head_size)
    heads = spec.num_kv_heads
    return (
        f"sparsekv: keys {asked.key_sparsity:.1%} asked, {fmt.key.sparsity:.1%} effective, "
        f"{asked.key_dtype}; "
        f"values {asked.value_sparsity:.1%} asked, "
        f"{fmt.value.sparsity:.1%} effective, {asked.value_dtype}; "
        f"{'calibrated; ' if asked.basis else ''}"
        f"{heads * fmt.token_bytes} bytes per token and layer against "
        f"{heads * fmt.dense_token_bytes} dense ({fmt.dense_token_bytes / fmt.token_bytes:.2f}x); "
        f"window {fmt.window} tokens; block size {spec.block_size}"
    )


class SparseKVImpl(AttentionImpl[SparseKVMetadata]):
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
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name,
        }
        for name, given in refused.items():
            if given:
                raise ValueError(f"{name}={given!r}: not supported by attention_backend=sparsekv")
        vllm_config = get_current_vllm_config()
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            raise ValueError(
                "disable_hybrid_kv_cache_manager=True: must be False with "
                "attention_backend=sparsekv; a KV connector without hybrid support sets it"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.format = layer_format(vllm_config, head_size)
        _formats[head_size, self.format.dtype] = self.format
        self.basis = Basis.of(self.format, vllm_config.device_config.device)
        self.basis_path = settings_of(vllm_config).basis
        self.window = self._add_window_layer(vllm_config) if self.format.window else None

    def _add_window_layer(self, vllm_config: VllmConfig) -> WindowLayer:
        layers = vllm_config.compilation_config.static_forward_context.values()
        index = first_layer_index(vllm_config) + sum(isinstance(x, WindowLayer) for x in layers)
        return WindowLayer(f"sparsekv.window.{index}", self.num_kv_heads, self.format, vllm_config)

    def _use_calibrated(self, layer_name: str, device: torch.device) -> None:
        """Take the layer's matrices, now that its name is known."""
        file = BasisFile.open(self.basis_path)
        heads = kv_heads_of_rank(
            file.num_kv_heads,
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
        )
        layer = file.layer(layer_index(layer_name))
        share = LayerMatrices(*(matrices[heads] for matrices in layer))
        self.basis = Basis.calibrated(self.format, share, device)
        self.basis_path = None

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
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
            key: (num_tokens, num_kv_heads, head_size) model dtype, after RoPE.
            value: (num_tokens, num_kv_heads, head_size) model dtype.
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
        if self.basis_path is not None:
            self._use_calibrated(layer.layer_name, query.device)
        if attn_metadata is None:
            return output
        step = attn_metadata
        key = change(key, self.basis.key)
        value = change(value, self.basis.value)
        api.pack(key, value, step.slot_mapping, kv_cache, self.format)
        window, window_block_table = None, None
        if self.window is not None:
            window = self.window.kv_cache
            window_block_table = layer_metadata(self.window.layer_name).block_table
        stored = torch.empty_like(output) if self.basis.output is not None else output
        api.sparse_attention(
            change(query, self.basis.query),
            key,
            value,
            kv_cache,
            window,
            step.query_start_loc,
            step.seq_lens,
            step.block_table,
            window_block_table,
            self.scale,
            self.format,
            stored,
            workspace=scratch,
        )
        if stored is not output:
            output.copy_(change(stored, self.basis.output))
        if window is not None:
            api.write_window(
                key,
                value,
                window,
                step.query_start_loc,
                step.seq_lens,
                step.slot_mapping,
                window_block_table,
                self.format,
            )
        return output
