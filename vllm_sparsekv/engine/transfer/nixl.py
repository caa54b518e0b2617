"""vLLM's NIXL connectors for sparse pages: a decoding engine gets what another has computed.

Pages go, the window stays: slots of a ring that were not written in its own engine have no tag, so
queries there read the pages. The classes have vLLM's names, for the user gives them.
"""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from vllm_sparsekv.engine.compat.nixl import (
    KVCacheConfig,
    KVConnectorRole,
    NixlBaseConnector,
    VllmConfig,
    VllmNixlPullConnector,
    VllmNixlPushConnector,
    tell_apart,
)
from vllm_sparsekv.engine.transfer.connectors import ORIGIN
from vllm_sparsekv.engine.window import RingSpec
from vllm_sparsekv.format.fingerprint import fingerprint


class _Pages(NixlBaseConnector):
    """Between engines whose pages have the same fingerprint and as many ranks; others compute."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        groups = [
            replace(group, enable_kv_transfer=not isinstance(group.kv_cache_spec, RingSpec))
            for group in kv_cache_config.kv_cache_groups
        ]
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, replace(kv_cache_config, kv_cache_groups=groups))
        os.sched_setaffinity(0, cores)  # vLLM's worker takes them all but one from this thread
        if role == KVConnectorRole.WORKER:
            extra = vllm_config.kv_transfer_config.kv_connector_extra_config
            transferred = self._kv_cache_config.transfer_groups
            block_size = min(group.kv_cache_spec.block_size for group in transferred)
            # A rank's pages hold its heads layer by layer: two halves are not a whole.
            ranks = vllm_config.parallel_config.tensor_parallel_size
            tell_apart(self, f"{fingerprint(extra[ORIGIN], block_size)}-{ranks}")

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Of pages, and of layers that are dense."""
        moved = self._kv_cache_config.transfer_group_index_by_layer
        super().register_kv_caches({name: kv_caches[name] for name in kv_caches if name in moved})


class NixlPullConnector(_Pages, VllmNixlPullConnector):
    """The decoding engine reads."""


class NixlPushConnector(_Pages, VllmNixlPushConnector):
    """The engine that has computed writes."""


NixlConnector = NixlPullConnector
