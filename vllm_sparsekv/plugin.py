"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in every process it starts."""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "SPARSEKV"
BACKEND_PATH = "vllm_sparsekv.backend.SparseKVBackend"


def register() -> None:
    """Make ``--attention-backend sparsekv`` known to vLLM. May run more than once.

    Raises:
        ImportError: the installed vLLM is not supported; names the versions that are.
    """
    backend_member()


def backend_member() -> Any:
    """Register everything and return the ``AttentionBackendEnum`` member."""
    from vllm_sparsekv import vllm_compat
    from vllm_sparsekv.admission import admit, refuse_unused_settings
    from vllm_sparsekv.window import RingManager, RingSpec

    member = vllm_compat.register_backend_member(BACKEND_NAME, BACKEND_PATH, backend_member)
    vllm_compat.watch_config(member, admit, refuse_unused_settings)
    vllm_compat.register_ring(RingSpec, RingManager)
    return member
