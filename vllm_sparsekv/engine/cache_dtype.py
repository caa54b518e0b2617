"""``--kv-cache-dtype sparsekv``, ``sparsekv_quality`` ...: sparse pages by a single field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sparsekv.engine.admission import SETTINGS_KEY
from vllm_sparsekv.engine.plugin import BACKEND_NAME
from vllm_sparsekv.settings import CACHE_DTYPES


def resolve_cache_dtype(engine_args: Any) -> None:
    """Write what a name of ``CACHE_DTYPES`` stands for into vLLM's engine arguments, in place.

    That is before vLLM makes its cache's configuration of them, which then takes ``auto``.

    Raises:
        ValueError: there is no such name, or another argument says otherwise; both are named.
    """
    name = engine_args.kv_cache_dtype
    if not str(name).startswith("sparsekv"):
        return
    if name not in CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype={name!r}: must be one of {sorted(CACHE_DTYPES)}")
    _select_backend(engine_args)
    additional = engine_args.additional_config
    settings = additional.get(SETTINGS_KEY) or {} if isinstance(additional, Mapping) else None
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"kv_cache_dtype={name!r}: additional_config={additional!r} must be a mapping, and so "
            f"must its {SETTINGS_KEY!r}"
        )
    preset = CACHE_DTYPES[name]
    if preset is not None:
        given = settings.get("preset")
        if given not in (None, preset):
            raise ValueError(
                f"kv_cache_dtype={name!r}: is preset {preset!r}, but sparsekv.preset={given!r}; "
                f"leave one of them out"
            )
        settings = dict(settings) | {"preset": preset}
    engine_args.additional_config = dict(additional) | {SETTINGS_KEY: settings}
    engine_args.kv_cache_dtype = "auto"


def _select_backend(engine_args: Any) -> None:
    chosen = engine_args.attention_backend or engine_args.attention_config.backend
    backend = str(getattr(chosen, "name", chosen or "auto"))
    if backend.lower() == "auto":
        engine_args.attention_backend = BACKEND_NAME
    elif backend.upper() != BACKEND_NAME:
        raise ValueError(
            f"kv_cache_dtype={engine_args.kv_cache_dtype!r}: needs attention_backend=sparsekv, "
            f"but it is {backend}; leave it out"
        )
