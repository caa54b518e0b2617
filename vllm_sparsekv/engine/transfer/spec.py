"""vLLM's offloading, for sparse pages: what ``OffloadingConnector`` loads by its name and path.

Host memory is vLLM's tiering; it and every tier below it are keyed by the pages' fingerprint.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from vllm_sparsekv.engine.compat.transfer import (
    CanonicalKVCaches,
    OffloadingConfig,
    OffloadingWorker,
    SharedOffloadRegion,
    TieringOffloadingSpec,
    pages_are_in_host_memory,
)
from vllm_sparsekv.engine.transfer.connectors import ORIGIN
from vllm_sparsekv.engine.transfer.files import SEAL
from vllm_sparsekv.engine.transfer.host import HostWorker
from vllm_sparsekv.format.fingerprint import fingerprint

FILES = {"type": "SealedFiles", "module_path": "vllm_sparsekv.engine.transfer.files"}


def chunk_bytes(pages: int) -> int:
    """Bytes that a chunk takes in host memory and in a file, of so many bytes of pages."""
    unit = TieringOffloadingSpec.BLOCK_SIZE_ALIGNMENT
    return math.ceil((pages + SEAL.size) / unit) * unit


class SparseKVOffloadingSpec(TieringOffloadingSpec):
    """vLLM's ``TieringOffloadingSpec`` with the fingerprint in the name of the cache's dtype.

    Raises:
        ValueError: the host memory holds no chunk.
    """

    secondary_tier_configs: list[dict[str, Any]]
    _worker: OffloadingWorker | None

    def __init__(self, config: OffloadingConfig) -> None:
        # Tiers key by the size of every group besides.
        block_size = min(group.tokens_per_block for group in config.groups)
        pages = fingerprint(config.extra_config[ORIGIN], block_size)
        super().__init__(
            replace(
                config,
                model=replace(config.model, dtype=f"{config.model.dtype}-{pages}"),
                # A rank's pages hold its heads layer by layer: two halves are not a whole.
                parallel=replace(config.parallel, is_parallelism_agnostic=False),
            )
        )
        self._make_room_for_seals()
        self.secondary_tier_configs = [
            tier | FILES if tier["type"] == "fs" else tier for tier in self.secondary_tier_configs
        ]

    def _make_room_for_seals(self) -> None:
        if not self.cpu_page_size_per_worker:  # no cache is planned yet
            return
        pages = self.cpu_page_size_per_worker * self.config.parallel.world_size
        self.kv_bytes_per_chunk = chunk_bytes(pages)
        memory = int(self.extra_config["cpu_bytes_to_use"])
        self.num_chunks = memory // self.kv_bytes_per_chunk
        if not self.num_chunks:
            raise ValueError(
                f"kv_connector_extra_config.cpu_bytes_to_use={memory}: must be >= "
                f"{self.kv_bytes_per_chunk}, one chunk of pages"
            )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """On CPUs ours, vLLM's elsewhere."""
        if self._worker is None and pages_are_in_host_memory():
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            self._worker = HostWorker(kv_caches, self.blocks_per_chunk, region)
        return super().get_worker(kv_caches)
