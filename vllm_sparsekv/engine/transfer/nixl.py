"""vLLM's NIXL connectors for sparse pages: a decoding engine gets what another has computed.

Pages go, the window stays: slots of a ring that were not written in its own engine have no tag, so
queries there read the pages. With ``move_window`` the ring goes too, whole blocks with their tags;
after a failed read vLLM frees them all, and a ring that is claimed anew is zeroed. The classes have
vLLM's names, for the user gives them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

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
from vllm_sparsekv.engine.transfer.connectors import MOVE_WINDOW, ORIGIN
from vllm_sparsekv.engine.window import RingSpec
from vllm_sparsekv.format.fingerprint import fingerprint


class _Pages(NixlBaseConnector):
    """Between engines whose pages have the same fingerprint and as many ranks; others compute."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._moves_window = extra.get(MOVE_WINDOW, False)
        groups = [
            replace(
                group,
                enable_kv_transfer=self._moves_window
                or not isinstance(group.kv_cache_spec, RingSpec),
            )
            for group in kv_cache_config.kv_cache_groups
        ]
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, role, replace(kv_cache_config, kv_cache_groups=groups))
        os.sched_setaffinity(0, cores)  # vLLM's worker takes them all but one from this thread
        if role == KVConnectorRole.WORKER:
            specs = [group.kv_cache_spec for group in self._kv_cache_config.transfer_groups]
            rings = {
                f"{spec.blocks_per_request}x{spec.num_states}x{spec.state_content_bytes}"
                for spec in specs
                if isinstance(spec, RingSpec)
            }
            block_size = min(spec.block_size for spec in specs)
            # A rank's pages hold its heads layer by layer: two halves are not a whole.
            ranks = vllm_config.parallel_config.tensor_parallel_size
            pages = fingerprint(extra[ORIGIN], block_size)
            tell_apart(self, "-".join([pages, str(ranks), *sorted(rings)]))

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Of pages, and of layers that are dense; rings lie in the same memory."""
        moved = {
            name
            for group in self._kv_cache_config.transfer_groups
            if not isinstance(group.kv_cache_spec, RingSpec)
            for name in group.layer_names
        }
        super().register_kv_caches({name: kv_caches[name] for name in kv_caches if name in moved})

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """A ring is zeroed in the step that asks for it, maybe not yet on the device."""
        starts = self._moves_window and self._connector_metadata.reqs_to_recv
        if starts and torch.accelerator.is_available():
            torch.accelerator.current_stream().synchronize()
        super().start_load_kv(forward_context, **kwargs)


class NixlPullConnector(_Pages, VllmNixlPullConnector):
    """The decoding engine reads."""


class NixlPushConnector(_Pages, VllmNixlPushConnector):
    """The engine that has computed writes."""


NixlConnector = NixlPullConnector
