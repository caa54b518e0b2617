"""Copies pages between an engine's cache on CPUs and the host memory of vLLM's offloading."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from vllm_sparsekv.engine.compat.transfer import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    SharedOffloadRegion,
    TransferResult,
)


class _Layer(NamedTuple):
    """Pages of a layer.

    Attributes:
        cache: (blocks, bytes of a page) int8.
        host: (chunks, blocks of a chunk, bytes of a page) int8.
    """

    cache: torch.Tensor
    host: torch.Tensor


class HostWorker(OffloadingWorker):
    """vLLM's ``OffloadingWorker`` for CPUs; a copy is done when its submission returns.

    Args:
        kv_caches: of this worker.
        blocks_per_chunk: of the offloading.
        region: memory of the chunks; the worker owns it from now on.
    """

    def __init__(
        self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion
    ) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        self._finished: list[TransferResult] = []
        layers = []
        for pages in kv_caches.tensors:
            size = pages.page_size_bytes
            host = region.create_next_worker_view(size * blocks_per_chunk)
            layers.append(
                _Layer(
                    pages.tensor.view(torch.int8).view(-1, size),
                    host.unflatten(1, (blocks_per_chunk, size)),
                )
            )
        self._groups = [
            [
                _Layer(*(pages[..., : ref.page_size_bytes] for pages in layers[ref.tensor_idx]))
                for ref in refs
            ]
            for refs in kv_caches.group_data_refs
        ]

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        return self._copy(job_id, src_spec, dst_spec, to_host=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, dst_spec, src_spec, to_host=False)

    def _copy(
        self, job_id: int, cache_spec: GPULoadStoreSpec, host_spec: LoadStoreSpec, to_host: bool
    ) -> bool:
        """Copy the blocks of every group in turn, from the middle of a chunk where one begins."""
        start = time.perf_counter()
        per_chunk = self._blocks_per_chunk
        blocks = torch.from_numpy(cache_spec.block_ids).long()
        chunks = torch.from_numpy(host_spec.block_ids).long()
        copied = block = chunk = 0
        for layers, count, first in zip(
            self._groups, cache_spec.group_sizes, cache_spec.block_indices, strict=True
        ):
            if not count:
                continue
            places = torch.arange(count) + first % per_chunk
            inside = blocks[block : block + count]
            outside = (chunks[chunk + places // per_chunk], places % per_chunk)
            for cache, host in layers:
                if to_host:
                    host[outside] = cache[inside]
                else:
                    cache[inside] = host[outside]
                copied += count * cache.shape[-1]
            block += count
            chunk += int(places[-1]) // per_chunk + 1
        self._finished.append(TransferResult(job_id, True, copied, time.perf_counter() - start))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever in flight."""

    def shutdown(self) -> None:
        self._groups.clear()
        self._region.cleanup()
