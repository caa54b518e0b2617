"""vLLM's NIXL connectors, with which an engine gets pages that another has computed.

Not imported by the package ``compat`` itself, as only engines that name the connector need it.
"""

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlPullConnector as VllmNixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlPushConnector as VllmNixlPushConnector,
)
from vllm.v1.kv_cache_interface import KVCacheConfig

__all__ = [
    "KVCacheConfig",
    "KVConnectorRole",
    "NixlBaseConnector",
    "VllmConfig",
    "VllmNixlPullConnector",
    "VllmNixlPushConnector",
    "tell_apart",
]


def tell_apart(connector: NixlBaseConnector, pages: str) -> None:
    """Have a worker's connector refuse engines of other ``pages``, and survive a refusal."""
    worker = connector.connector_worker
    worker.backend_name = f"{worker.backend_name}-{pages}"  # goes into vLLM's compatibility hash
    worker._is_hma_required = True  # else a failed read of several cache groups ends the scheduler
