"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in every process it starts."""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "SPARSEKV"
BACKEND_PATH = "vllm_sparsekv.engine.backend.SparseKVBackend"


def register() -> None:
    """Make ``--attention-backend sparsekv`` known to vLLM. May run more than once.

    Raises:
        ImportError: the installed vLLM is not supported; names the versions that are.
    """
    backend_member()


def backend_member() -> Any:
    """Register everything and return the ``AttentionBackendEnum`` member."""
    from vllm_sparsekv.engine import compat
    from vllm_sparsekv.engine.admission import admit, admit_derived, refuse_unused_settings
    from vllm_sparsekv.engine.cache_dtype import resolve_cache_dtype
    from vllm_sparsekv.engine.window import RingManager, RingSpec

    member = compat.register_backend_member(BACKEND_NAME, BACKEND_PATH, backend_member)
    compat.watch_engine_arguments(resolve_cache_dtype)
    compat.watch_config(member, admit, admit_derived, refuse_unused_settings)
    compat.watch_layers(_prepare_layers)
    compat.register_ring(RingSpec, RingManager)
    compat.watch_metrics(_measure, _describe)
    return member


def _measure(*arguments: Any) -> Any:
    from vllm_sparsekv.engine.metrics import measure

    return measure(*arguments)


def _describe(*arguments: Any) -> Any:
    from vllm_sparsekv.engine.metrics import describe

    return describe(*arguments)


def _prepare_layers(*arguments: Any) -> None:
    # The backend it brings along is for workers only.
    from vllm_sparsekv.engine.layers import prepare

    prepare(*arguments)
