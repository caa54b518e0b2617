"""LMCache's ``LMCacheMPConnector`` for sparse pages, which its server keeps by the model's name.

Pages go, the window stays. The class has LMCache's name, for the user gives it.
"""

from __future__ import annotations

import torch

from vllm_sparsekv.engine.compat.lmcache import (
    KVCacheConfig,
    KVConnectorRole,
    ServedByLMCache,
    VllmConfig,
    under_name,
)
from vllm_sparsekv.engine.transfer.connectors import ORIGIN
from vllm_sparsekv.engine.window import RingSpec
from vllm_sparsekv.format.fingerprint import fingerprint


class LMCacheMPConnector(ServedByLMCache):
    """Under a name with the pages' fingerprint; ranks and number of ranks LMCache keys itself."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        block_size = min(spec.block_size for spec in specs if not isinstance(spec, RingSpec))
        origin = vllm_config.kv_transfer_config.kv_connector_extra_config[ORIGIN]
        name = f"{vllm_config.model_config.model}-{fingerprint(origin, block_size)}"
        super().__init__(under_name(vllm_config, name), role, kv_cache_config)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Of pages, and of layers that are dense."""
        rings = {
            name
            for group in self._kv_cache_config.kv_cache_groups
            for name in group.layer_names
            if isinstance(group.kv_cache_spec, RingSpec)
        }
        super().register_kv_caches(
            {name: kv_caches[name] for name in kv_caches if name not in rings}
        )
