"""vLLM's model and its cache plan, of an engine that is not started and without weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning as kv_cache_utils
except ImportError:
    from vllm.v1.core import kv_cache_utils


def current_device() -> tuple[str, tuple[int, int] | None]:
    """The type of device vLLM runs on here, and a GPU's compute capability."""
    capability = current_platform.get_device_capability()
    return current_platform.device_type, None if capability is None else tuple(capability)


def engine_config(options: dict[str, Any]) -> VllmConfig:
    """The configuration of a server's engine with these options of vLLM's.

    Raises:
        ValueError: vLLM or this package refuses it.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    return EngineArgs(**options).create_engine_config(UsageContext.OPENAI_API_SERVER)


@contextmanager
def single_worker() -> Iterator[None]:
    """This process stands for the only worker of an engine, as models are built in one."""
    with tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def build_without_weights(vllm_config: VllmConfig) -> None:
    """Build the model on torch's meta device; its attention layers register in ``vllm_config``.

    Needs :func:`single_worker` around it.
    """
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(vllm_config):
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            initialize_model(vllm_config)


def plan_cache(vllm_config: VllmConfig, memory: int) -> tuple[Any, int]:
    """Have vLLM plan the cache of the layers that were built.

    Args:
        memory: bytes of the KV cache.

    Returns:
        vLLM's ``KVCacheConfig``, and the KV cache size in tokens as vLLM reports it.

    Raises:
        ValueError: a request of ``max_model_len`` tokens does not fit.
    """
    (planned,) = plan_ranks([vllm_config], [memory])
    return planned, get_kv_cache_capacity(vllm_config, planned)[0]


def plan_ranks(configs: list[VllmConfig], memory: list[int]) -> list[Any]:
    """The same for the ranks of one engine, each with the layers that were built in its own.

    Args:
        configs: the engine's configuration, as each rank has it.
        memory: bytes of each rank's KV cache.
    """
    specs = [_prepared_specs(vllm_config) for vllm_config in configs]
    together = getattr(kv_cache_utils, "get_global_kv_cache_groups", None)
    grouped = [together(configs[0], specs)] if together else []
    return kv_cache_utils.get_kv_cache_configs(configs[0], specs, memory, *grouped)


def _prepared_specs(vllm_config: VllmConfig) -> dict[str, Any]:
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    current_platform.update_block_size_for_backend(vllm_config)
    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    return get_kv_cache_spec(vllm_config)
