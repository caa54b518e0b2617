"""Which of vLLM's KV connectors carry sparse pages, and what slides in under their names.

A connector must take two cache groups, pages and window, and key what it keeps or moves by the
pages' fingerprint. It is checked where vLLM has made up its mind which to use, so
``--kv-offloading-size`` is seen as well.
"""

from __future__ import annotations

from typing import Any

from vllm_sparsekv.engine.admission import settings_of
from vllm_sparsekv.engine.compat import (
    VllmConfig,
    model_configuration,
    weights_identity,
)
from vllm_sparsekv.format.fingerprint import origin

CARRIED = ("OffloadingConnector", "MultiConnector")
"""``MultiConnector`` if all its own connectors are."""

_ONE_GROUP = "takes one cache group; sparse pages and their window are two"
_UNKEYED = "does not key pages by their settings: other engines would read them as garbage"

REFUSED = {
    "DecodeBenchConnector": "fills pages with numbers that are no pages",
    "ExampleConnector": _ONE_GROUP,
    "ExampleHiddenStatesConnector": "reads hidden states from dense pages",
    "FlexKVConnectorV1": _ONE_GROUP,
    "HF3FSKVConnector": _ONE_GROUP,
    "HiSparseConnector": "is for models with sparse attention of their own",
    "LMCacheConnectorV1": _ONE_GROUP,
    "LMCacheMPConnector": "takes the window's shape for that of all pages",
    "MoRIIOConnector": "refuses the window's cache group",
    "MooncakeConnector": _UNKEYED,
    "MooncakeStoreConnector": _UNKEYED,
    "NixlConnector": "cannot partition the window's blocks",
    "NixlPullConnector": "cannot partition the window's blocks",
    "NixlPushConnector": "cannot partition the window's blocks",
    "SimpleCPUOffloadConnector": "keeps blocks of the window too; OffloadingConnector does not",
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
ORIGIN = "sparsekv_origin"
"""In ``kv_connector_extra_config``: what :func:`page_origin` returns."""

STOCK_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")


def prepare_connector(vllm_config: VllmConfig) -> None:
    """Refuse a connector that does not carry sparse pages; have the others use ours inside.

    Raises:
        ValueError: names the field, the value and the connectors that do.
    """
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    transfer.kv_connector_extra_config = _prepared(
        transfer.kv_connector,
        transfer.kv_connector_module_path,
        transfer.kv_connector_extra_config,
        page_origin(vllm_config),
    )


def page_origin(vllm_config: VllmConfig) -> str:
    """The ``origin`` of this engine's pages."""
    model = vllm_config.model_config
    return origin(
        settings_of(vllm_config),
        model=str(model.model),
        revision=model.revision,
        weights=[str(model.quantization), *weights_identity(vllm_config)],
        configuration=model_configuration(vllm_config),
        dtype=str(model.dtype),
    )


def _prepared(
    name: str, module_path: str | None, extra: dict[str, Any], page_origin: str
) -> dict[str, Any]:
    """``kv_connector_extra_config`` of a connector as it has to be."""
    if name not in CARRIED or module_path:
        reason = REFUSED.get(name, "is not known to key pages by their settings")
        raise ValueError(
            f"kv_connector={name!r}: {'comes from ' + module_path + ' and ' if module_path else ''}"
            f"{reason}; must be one of {list(CARRIED)} with attention_backend=sparsekv"
        )
    if name == "MultiConnector":
        return extra | {
            "connectors": [
                child
                | {
                    "kv_connector_extra_config": _prepared(
                        child.get("kv_connector"),
                        child.get("kv_connector_module_path"),
                        child.get("kv_connector_extra_config", {}),
                        page_origin,
                    )
                }
                for child in extra.get("connectors", [])
            ]
        }
    _check_offloading(extra)
    return extra | SPEC | {ORIGIN: page_origin}


def _check_offloading(extra: dict[str, Any]) -> None:
    where = "kv_connector_extra_config."
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
        kind = tier.get("type")
        if kind not in CARRIED_TIERS or tier.get("module_path"):
            reason = REFUSED_TIERS.get(kind, "is not known to key pages by their settings")
            raise ValueError(
                f"{where}secondary_tiers: type {kind!r} {reason}; must be one of "
                f"{list(CARRIED_TIERS)} with attention_backend=sparsekv"
            )
