"""What vLLM moves pages with: its KV connectors and its offloading tiers.

Not imported by the package ``compat`` itself: it brings along vLLM's copy kernels, which only
engines that offload need.
"""

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    OffloadKey,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobId, TransferJob
from vllm.v1.kv_offload.tiering.fs.io import batch_load_block
from vllm.v1.kv_offload.tiering.fs.manager import FileSystemTierManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

__all__ = [
    "CanonicalKVCaches",
    "FileSystemTierManager",
    "GPULoadStoreSpec",
    "JobId",
    "LoadStoreSpec",
    "OffloadKey",
    "OffloadingConfig",
    "OffloadingWorker",
    "SharedOffloadRegion",
    "TieringOffloadingSpec",
    "TransferJob",
    "TransferResult",
    "batch_load_block",
    "pages_are_in_host_memory",
]


def pages_are_in_host_memory() -> bool:
    """On CPUs, for which vLLM has no worker that copies pages."""
    return current_platform.is_cpu()
