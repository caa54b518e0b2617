"""Every vLLM internal this package uses; nothing else imports vLLM.

Importing this package on an unsupported vLLM raises one line that says what to install.
"""

from vllm_sparsekv.engine.compat.version import VLLM_VERSION, check_version  # isort: split

from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.nixl_utils import is_nixl_available
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import AttentionSpec, CircularBufferSpec, KVCacheLayout

from vllm_sparsekv.engine.compat.config import (
    changed_options,
    describe_drafter,
    describe_model,
    deselect_backend,
    forget_cache_dtype_of_checkpoint,
    has_drafter,
    has_weights,
    is_drafters,
    largest_position,
    lookahead_tokens,
    model_identity,
    parse_engine_options,
    reads_first_group,
    settle_connector,
)
from vllm_sparsekv.engine.compat.hooks import (
    engine_arguments,
    register_backend_member,
    register_ring,
    show_drafters,
    watch_config,
    watch_engine_arguments,
    watch_layers,
    zero_on_cpu,
)
from vllm_sparsekv.engine.compat.layers import (
    attention_layers,
    cache_specs,
    layer_index,
    layer_metadata,
    of_ranks,
    output_projection,
    platform_backend,
    register_before,
    register_first,
    replace_backend,
    state_pages,
    workspace,
)
from vllm_sparsekv.engine.compat.metrics import Metric, watch_metrics
from vllm_sparsekv.engine.compat.offline import (
    emulates_dtype,
    first_token,
    model_config,
    offline_engine,
    read_prompts,
    write_tokens,
)
from vllm_sparsekv.engine.compat.planning import (
    build_without_weights,
    current_device,
    engine_config,
    plan_cache,
    single_worker,
)

__all__ = [
    "VLLM_VERSION",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionType",
    "CircularBufferManager",
    "CircularBufferSpec",
    "CommonAttentionMetadata",
    "KVCacheLayout",
    "Metric",
    "MultipleOf",
    "VllmConfig",
    "attention_layers",
    "build_without_weights",
    "cache_specs",
    "changed_options",
    "check_version",
    "current_device",
    "describe_drafter",
    "describe_model",
    "deselect_backend",
    "emulates_dtype",
    "engine_arguments",
    "engine_config",
    "first_token",
    "forget_cache_dtype_of_checkpoint",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "has_drafter",
    "has_weights",
    "init_logger",
    "is_drafters",
    "is_nixl_available",
    "largest_position",
    "layer_index",
    "layer_metadata",
    "lookahead_tokens",
    "model_config",
    "model_identity",
    "of_ranks",
    "offline_engine",
    "output_projection",
    "parse_engine_options",
    "plan_cache",
    "platform_backend",
    "read_prompts",
    "reads_first_group",
    "register_backend_member",
    "register_before",
    "register_first",
    "register_ring",
    "replace_backend",
    "settle_connector",
    "single_worker",
    "show_drafters",
    "state_pages",
    "watch_config",
    "watch_engine_arguments",
    "watch_layers",
    "watch_metrics",
    "workspace",
    "write_tokens",
    "zero_on_cpu",
]
