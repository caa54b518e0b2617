"""Which pages are interchangeable: those of equal fingerprints.

Everything that keeps pages beyond an engine's life, or moves them to another engine, is keyed by
it. Pages of other settings have the same size more often than not, and are read as garbage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_sparsekv.settings import SparseKVConfig

PAGE_VERSION = 2
"""Raised by any change of the bytes of a page."""

PAGE_SETTINGS = ("key_sparsity", "value_sparsity", "key_dtype", "value_dtype", "skip_layers")
"""Settings that shape pages, besides the content of the basis; the window is no part of a page."""


def origin(
    settings: SparseKVConfig,
    *,
    model: str,
    revision: str | None,
    weights: Sequence[str],
    configuration: Mapping[str, Any],
    dtype: str,
    drafter: Mapping[str, Any] | None = None,
) -> str:
    """What pages follow from, but for their block size, which vLLM may settle later.

    Args:
        settings: of the engine, with the ``basis_sha256`` of its basis.
        model: name or path.
        revision: of the model, None for the hub's own choice.
        weights: what tells them from others of the same name.
        configuration: of the model; the order of its keys does not matter.
        dtype: of the model.
        drafter: the same of a model that drafts, whose pages are kept and moved with these.

    Returns:
        A sha256, hexadecimal.
    """
    return _sha256(
        {
            "version": PAGE_VERSION,
            "settings": {name: getattr(settings, name) for name in PAGE_SETTINGS},
            "basis": settings.basis_sha256 if settings.basis_path else None,
            "model": model,
            "revision": revision,
            "weights": list(weights),
            "configuration": configuration,
            "dtype": dtype,
            "drafter": drafter,
        }
    )


def fingerprint(origin: str, block_size: int) -> str:
    """Of the pages of an engine.

    Args:
        origin: as :func:`origin` returns it.
        block_size: N, tokens of a page.

    Returns:
        A sha256, hexadecimal.
    """
    return _sha256({"origin": origin, "block_size": block_size})


def _sha256(parts: Mapping[str, Any]) -> str:
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
