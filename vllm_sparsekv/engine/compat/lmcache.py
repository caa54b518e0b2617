"""LMCache's connector to its server, with which engines share pages of other processes' memory.

Not imported by the package ``compat`` itself, as only engines that name the connector need it.
vLLM's connector of the same name takes one cache group.
"""

from copy import copy

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector as ServedByLMCache
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = ["KVCacheConfig", "KVConnectorRole", "ServedByLMCache", "VllmConfig", "under_name"]


def under_name(vllm_config: VllmConfig, name: str) -> VllmConfig:
    """The configuration, with this name for the model."""
    renamed = copy(vllm_config)
    renamed.model_config = copy(vllm_config.model_config)
    renamed.model_config.model = name
    return renamed
