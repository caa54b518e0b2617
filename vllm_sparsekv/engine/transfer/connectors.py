"""Which of vLLM's KV connectors carry sparse pages, and what slides in under their names.

A connector must take two cache groups, pages and window, and key what it keeps or moves by the
pages' fingerprint.
"""

from __future__ import annotations

from copy import copy
from importlib.util import find_spec
from typing import Any

from vllm_sparsekv.engine.compat import (
    VllmConfig,
    describe_drafter,
    describe_model,
    is_nixl_available,
    settle_connector,
)
from vllm_sparsekv.format.fingerprint import origin
from vllm_sparsekv.settings import SparseKVConfig

NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
LMCACHE = "LMCacheMPConnector"
CARRIED = ("OffloadingConnector", "MultiConnector", *NIXL, LMCACHE)
"""``MultiConnector`` if all its own connectors are."""

_ONE_GROUP = "takes one cache group; sparse pages and their window are two"
_UNKEYED = "does not key pages by their settings: other engines would read them as garbage"
_UNKNOWN = "is not known to key pages by their settings"
_EXTRA = "kv_connector_extra_config"

REFUSED = {
    "DecodeBenchConnector": "fills pages with numbers that are no pages",
    "ExampleConnector": _ONE_GROUP,
    "ExampleHiddenStatesConnector": "is a debugging aid, untried with sparse pages",
    "FlexKVConnectorV1": _ONE_GROUP,
    "HF3FSKVConnector": _ONE_GROUP,
    "HiSparseConnector": "needs an attention backend of its own",
    "LMCacheConnectorV1": _ONE_GROUP,
    "MoRIIOConnector": "refuses the window's cache group",
    "MooncakeConnector": _UNKEYED,
    "MooncakeStoreConnector": _UNKEYED,
    "SimpleCPUOffloadConnector": "is for CUDA alone and untried; OffloadingConnector does the same",
}
"""vLLM's other connectors, and why."""

CARRIED_TIERS = ("fs", "obj", "p2p")
"""Of ``OffloadingConnector``, below host memory: those that key by the fingerprint."""

REFUSED_TIERS = {
    "example": "is an example",
    "kvcr": _UNKEYED,
}

SPEC = {
    "spec_name": "SparseKVOffloadingSpec",
    "spec_module_path": "vllm_sparsekv.engine.transfer.spec",
}
MODULES = dict.fromkeys(NIXL, "vllm_sparsekv.engine.transfer.nixl") | {
    LMCACHE: "vllm_sparsekv.engine.transfer.lmcache"
}
"""Where the classes are that take the place of vLLM's."""

LMCACHES_MODULE = "lmcache.integration.vllm.lmcache_mp_connector"

ORIGIN = "sparsekv_origin"
"""In ``kv_connector_extra_config``: what :func:`page_origin` returns."""

MOVE_WINDOW = "move_window"
"""In ``kv_connector_extra_config`` of NIXL's: whether a request's window is moved as well."""

STOCK_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")


def check_connector(vllm_config: VllmConfig) -> None:
    """Refuse a connector that does not carry sparse pages.

    Raises:
        ValueError: names the field, the value and the connectors that do.
    """
    settle_connector(vllm_config)
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        _check(
            transfer.kv_connector,
            transfer.kv_connector_module_path,
            transfer.kv_connector_extra_config,
        )


def prepare_connector(vllm_config: VllmConfig, settings: SparseKVConfig) -> None:
    """Have a connector that was checked use what is ours, in this engine alone."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    made_of = page_origin(vllm_config, settings)
    changed = _ours(transfer.kv_connector, transfer.kv_connector_extra_config, made_of)
    vllm_config.kv_transfer_config = transfer = copy(transfer)
    for name, value in changed.items():
        setattr(transfer, name, value)


def page_origin(vllm_config: VllmConfig, settings: SparseKVConfig) -> str:
    """The ``origin`` of this engine's pages, which have these settings."""
    return origin(
        settings,
        **describe_model(vllm_config.model_config),
        drafter=describe_drafter(vllm_config),
    )


def _ours(name: str, extra: dict[str, Any], made_of: str) -> dict[str, Any]:
    """What changes in the configuration of a connector, or of those it has."""
    if name == "MultiConnector":
        children = [
            child | _ours(child["kv_connector"], child.get(_EXTRA, {}), made_of)
            for child in extra["connectors"]
        ]
        return {_EXTRA: extra | {"connectors": children}}
    if name in MODULES:
        return {_EXTRA: extra | {ORIGIN: made_of}, "kv_connector_module_path": MODULES[name]}
    return {_EXTRA: extra | SPEC | {ORIGIN: made_of}}


def _check(name: str | None, module_path: str | None, extra: dict[str, Any]) -> None:
    if name in NIXL and module_path in (None, MODULES[name]):
        _check_nixl(name, extra)
        return
    if MOVE_WINDOW in extra:
        raise ValueError(f"{_EXTRA}.{MOVE_WINDOW}: only one of {list(NIXL)} moves windows")
    if name == LMCACHE and module_path in (None, LMCACHES_MODULE, MODULES[name]):
        _check_lmcache()
        return
    if name not in CARRIED or module_path:
        reason = _UNKNOWN if module_path else REFUSED.get(str(name), _UNKNOWN)
        raise ValueError(
            f"kv_connector={name!r}{_of(module_path)}: {reason}; must be one of "
            f"{list(CARRIED)} with attention_backend=sparsekv"
        )
    if name == "OffloadingConnector":
        _check_offloading(extra)
        return
    if not extra.get("connectors"):
        raise ValueError(f"{_EXTRA}.connectors: must name the connectors of a MultiConnector")
    for child in extra["connectors"]:
        _check(
            child.get("kv_connector"), child.get("kv_connector_module_path"), child.get(_EXTRA, {})
        )


def _check_nixl(name: str, extra: dict[str, Any]) -> None:
    if not is_nixl_available():
        raise ValueError(f"kv_connector={name!r}: needs the package nixl (pip install nixl)")
    if not extra.get("enforce_handshake_compat", True):
        raise ValueError(
            f"{_EXTRA}.enforce_handshake_compat=False: must be True with "
            f"attention_backend=sparsekv, engines would read pages of other settings as garbage"
        )
    if not isinstance(extra.get(MOVE_WINDOW, False), bool):
        raise ValueError(f"{_EXTRA}.{MOVE_WINDOW}={extra[MOVE_WINDOW]!r}: must be true or false")


def _check_lmcache() -> None:
    if find_spec("lmcache") is None:
        raise ValueError(
            f"kv_connector={LMCACHE!r}: needs the package lmcache (pip install lmcache)"
        )


def _check_offloading(extra: dict[str, Any]) -> None:
    where = f"{_EXTRA}."
    spec = extra.get("spec_name", STOCK_SPECS[0])
    if spec not in (*STOCK_SPECS, SPEC["spec_name"]):
        raise ValueError(
            f"{where}spec_name={spec!r}: must be left out with attention_backend=sparsekv, which "
            f"brings its own"
        )
    if not extra.get("cpu_bytes_to_use"):
        raise ValueError(f"{where}cpu_bytes_to_use: must be given, bytes of host memory")
    if int(extra.get("store_threshold", 0)) >= 2:
        raise ValueError(f"{where}store_threshold={extra['store_threshold']!r}: must be < 2")
    if extra.get("canonical_layout"):
        raise ValueError(
            f"{where}canonical_layout={extra['canonical_layout']!r}: must be False with "
            f"attention_backend=sparsekv, pages are not rows of tokens"
        )
    for tier in extra.get("secondary_tiers", []):
        kind, module_path = tier.get("type"), tier.get("module_path")
        if kind not in CARRIED_TIERS or module_path:
            reason = _UNKNOWN if module_path else REFUSED_TIERS.get(kind, _UNKNOWN)
            raise ValueError(
                f"{where}secondary_tiers: type {kind!r}{_of(module_path)} {reason}; must be one of "
                f"{list(CARRIED_TIERS)} with attention_backend=sparsekv"
            )


def _of(module_path: str | None) -> str:
    return f" of {module_path}" if module_path else ""
