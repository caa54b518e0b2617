"""KV connectors are refused or made to carry sparse pages while vLLM builds its configuration."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import MODEL, ROOT
from planning import Layer, build_layers, plan
from planning import configure as configure_shape
from test_admission import configure
from test_planning import LLAMA_8B
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.distributed.nixl_utils import is_nixl_available
from vllm.distributed.parallel_state import ensure_model_parallel_initialized
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_sparsekv.engine import report
from vllm_sparsekv.engine.compat import single_worker
from vllm_sparsekv.engine.transfer import connectors
from vllm_sparsekv.engine.transfer.connectors import CARRIED, CARRIED_TIERS, ORIGIN, SPEC

UNCALIBRATED = {"sparsekv": {"basis": "none"}}
HOST = {"cpu_bytes_to_use": 1 << 26}


def admitted(
    name: str | None = "OffloadingConnector", extra: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The connector's configuration as the engine gets it."""
    if name is not None:
        options["kv_transfer_config"] = KVTransferConfig(
            kv_connector=name,
            kv_role="kv_both",
            kv_connector_extra_config=HOST if extra is None else extra,
            kv_connector_module_path=options.pop("module_path", None),
        )
    options = {"additional_config": UNCALIBRATED} | options
    return configure(**options).kv_transfer_config


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        admitted(*args, **options)
    return str(raised.value)


def test_the_tables_name_every_connector_and_tier_of_vllm():
    assert sorted(KVConnectorFactory._registry) == sorted([*CARRIED, *connectors.REFUSED])
    assert sorted(SecondaryTierFactory._registry) == sorted(
        [*CARRIED_TIERS, *connectors.REFUSED_TIERS]
    )
    assert sorted(OffloadingSpecFactory._registry) == sorted(connectors.STOCK_SPECS)


def test_the_page_on_support_says_the_same():
    carried = {name: "works" for name in CARRIED} | {
        "LMCacheMPConnector": "works, as LMCache's own class",
        "MultiConnector": "works with those that do",
    }
    refused = {name: f"refused: {reason}" for name, reason in connectors.REFUSED.items()}
    rows = {f"`{name}`": says for name, says in (carried | refused).items()}
    rows |= {f"`OffloadingConnector`, tier `{tier}`": "works" for tier in CARRIED_TIERS}
    rows |= {
        f"`OffloadingConnector`, tier `{tier}`": f"refused: {reason}"
        for tier, reason in connectors.REFUSED_TIERS.items()
    }
    table = "".join(f"| {name} | {says} |\n" for name, says in sorted(rows.items()))
    page = (ROOT / "docs" / "pages" / "support.md").read_text()
    assert f"| connector | |\n|---|---|\n{table}\n" in page, table


@pytest.mark.parametrize("name", sorted({*connectors.REFUSED} - {"HiSparseConnector"}))
def test_other_connectors_are_refused_with_those_that_do(name):
    message = refusal(name)
    assert f"kv_connector={name!r}: {connectors.REFUSED[name]}; must be one of " in message
    assert str(list(CARRIED)) in message


def test_the_stock_connector_gets_our_spec_and_the_origin_of_the_pages():
    config = admitted(extra=HOST | {"spec_name": "TieringOffloadingSpec", "eviction_policy": "arc"})
    assert config.kv_connector == "OffloadingConnector"
    assert config.kv_connector_module_path is None
    extra = dict(config.kv_connector_extra_config)
    assert len(extra.pop(ORIGIN)) == 64
    assert extra == HOST | SPEC | {"eviction_policy": "arc"}
    assert issubclass(
        OffloadingSpecFactory.get_spec_cls(config.kv_connector_extra_config),
        OffloadingSpecFactory.get_spec_cls({"spec_name": "TieringOffloadingSpec"}),
    )


def test_a_size_alone_is_enough():
    config = admitted(None, kv_offloading_size=0.5)
    extra = config.kv_connector_extra_config
    assert config.kv_connector == "OffloadingConnector"
    assert config.kv_role == "kv_both"
    assert extra["cpu_bytes_to_use"] == 1 << 29
    assert extra.items() >= SPEC.items()
    assert len(extra[ORIGIN]) == 64


def test_a_size_goes_with_tiers_that_are_named():
    tiers = [{"type": "fs", "root_dir": "/somewhere"}]
    config = admitted(extra={"secondary_tiers": tiers}, kv_offloading_size=0.5)
    extra = config.kv_connector_extra_config
    assert extra["cpu_bytes_to_use"] == 1 << 29
    assert extra["secondary_tiers"] == tiers
    assert extra.items() >= SPEC.items()


def test_other_backends_of_the_size_are_refused(monkeypatch):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    assert "kv_connector='SimpleCPUOffloadConnector': " in refusal(None, kv_offloading_size=1)


def test_connectors_of_a_multi_connector_are_seen_to_as_well():
    child = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": HOST,
    }
    config = admitted("MultiConnector", {"connectors": [child, child]})
    assert config.kv_connector_extra_config.keys() == {"connectors"}
    for found in config.kv_connector_extra_config["connectors"]:
        assert found.keys() == child.keys()
        extra = dict(found["kv_connector_extra_config"])
        assert len(extra.pop(ORIGIN)) == 64
        assert extra == HOST | SPEC
    other = child | {"kv_connector": "MooncakeConnector"}
    assert "kv_connector='MooncakeConnector': " in refusal(
        "MultiConnector", {"connectors": [child, other]}
    )


def test_hybrid_support_stays_on():
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=HOST
    )
    config = configure(kv_transfer_config=transfer, additional_config=UNCALIBRATED)
    assert config.scheduler_config.disable_hybrid_kv_cache_manager is False


def test_what_the_user_gave_is_left_alone():
    transfer = KVTransferConfig(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config=copy.deepcopy(HOST),
    )
    made = [
        configure(kv_transfer_config=transfer, additional_config={"sparsekv": settings})
        for settings in ({"basis": "none"}, {"basis": "none", "preset": "sparse-50"})
    ]
    first, second = (one.kv_transfer_config.kv_connector_extra_config[ORIGIN] for one in made)
    assert transfer.kv_connector_extra_config == HOST
    assert first != second
    assert made[0].kv_transfer_config.engine_id == transfer.engine_id


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"additional_config": {"sparsekv": {"basis": "none", "window": 0}}}, True),
        ({"additional_config": {"sparsekv": {"basis": "none", "value_dtype": "fp8"}}}, False),
        ({"dtype": "float32"}, False),
        ({"hf_overrides": {"rope_theta": 5e5}}, False),
        ({"max_model_len": 512}, True),
    ],
)
def test_the_origin_follows_what_is_configured(options, same):
    first, second = (admitted(**given).kv_connector_extra_config[ORIGIN] for given in ({}, options))
    assert (first == second) is same


def test_the_origin_follows_the_weights(tmp_path):
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    origins = set()
    for weights in (b"some", b"others"):
        (tmp_path / "pytorch_model.bin").write_bytes(weights)
        origins.add(admitted(model=tmp_path).kv_connector_extra_config[ORIGIN])
    assert len(origins) == 2


def test_the_origin_follows_the_drafter(tmp_path):
    """Whose pages go wherever the target's do."""

    def origin(method: str, path: str | None = None, **more: Any) -> str:
        tokens = {"num_speculative_tokens": 2}
        drafts = {"method": method, "model": path} | tokens | more
        return admitted(speculative_config=drafts).kv_connector_extra_config[ORIGIN]

    paths = []
    for weights in (b"some", b"others"):
        folder = tmp_path / str(len(paths)) / "drafter"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((MODEL / "config.json").read_bytes())
        (folder / "pytorch_model.bin").write_bytes(weights)
        paths.append(str(folder))
    one, other = (origin("draft_model", path) for path in paths)
    alone = admitted().kv_connector_extra_config[ORIGIN]
    assert len({one, other, alone}) == 3
    assert origin("draft_model", paths[0]) == one
    assert origin("ngram", prompt_lookup_max=4) == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra": {}}, "kv_connector_extra_config.cpu_bytes_to_use: must be given, bytes of host"),
        (
            {"extra": HOST | {"spec_name": "Mine"}},
            "extra_config.spec_name='Mine': must be left out",
        ),
        ({"extra": HOST | {"store_threshold": 2}}, "extra_config.store_threshold=2: must be < 2"),
        (
            {"extra": HOST | {"canonical_layout": True}},
            "extra_config.canonical_layout=True: must be False",
        ),
        (
            {"extra": HOST | {"secondary_tiers": [{"type": "kvcr"}]}},
            "secondary_tiers: type 'kvcr' does not key pages by their settings: other engines "
            "would read them as garbage; must be one of ['fs', 'obj', 'p2p']",
        ),
        (
            {"extra": HOST | {"secondary_tiers": [{"type": "fs", "module_path": "a.b"}]}},
            "secondary_tiers: type 'fs' of a.b is not known to key pages by their settings",
        ),
        (
            {"module_path": "a.b"},
            "kv_connector='OffloadingConnector' of a.b: is not known to key pages by their",
        ),
        (
            {"name": "MultiConnector", "extra": {}},
            "kv_connector_extra_config.connectors: must name the connectors of a MultiConnector",
        ),
        (
            {"extra": HOST | {"move_window": True}},
            "kv_connector_extra_config.move_window: only one of ['NixlConnector', ",
        ),
        ({"name": "Mine", "module_path": "a.b"}, "kv_connector='Mine' of a.b: is not known to"),
    ],
)
def test_what_cannot_carry_sparse_pages_is_refused(options, message):
    assert message in refusal(**options)


def test_an_engine_without_sparse_pages_is_left_alone():
    config = admitted(attention_backend=None, additional_config={})
    assert config.kv_connector_extra_config == HOST


def test_bytes_of_a_token_below_the_cache(tmp_path):
    """Llama-3.1-8B's shape: 8 heads of 64 + 2 bytes of keys and 48 + 2 of values, 32 layers."""
    given = configure_shape(
        tmp_path,
        LLAMA_8B,
        attention_backend="sparsekv",
        additional_config={"sparsekv": {"key_dtype": "int4", "value_dtype": "int3"}},
        kv_offloading_size=1,
        load_format="dummy",
    )
    layers = build_layers(given, dict.fromkeys(range(32), Layer()))
    made = plan(given)
    lines = report.lines(given, {layer.layer_name: layer for layer in layers}, {}, {}, set())
    assert lines[-1] == (
        "sparsekv: OffloadingConnector keeps and moves 29696 bytes per token against 131072 dense "
        "(4.41x)"
    )
    spec = OffloadingSpecFactory.create_spec(build_offloading_config(made.config, made.groups))
    page = 64 * 29696
    assert spec.cpu_page_size_per_worker == page
    assert page < spec.kv_bytes_per_chunk <= 1.01 * page
    assert spec.num_chunks == (1 << 30) // spec.kv_bytes_per_chunk


NIXL = pytest.mark.skipif(not is_nixl_available(), reason="needs nixl, pip install nixl")
SMALL = LLAMA_8B | {"num_hidden_layers": 2}
PAGE = 64 * 8 * 116
"""Bytes of a layer's page: 64 tokens, 8 heads of 64 + 2 bytes of keys and 48 + 2 of values."""


@pytest.fixture
def worker() -> Iterator[None]:
    with single_worker():
        yield


def construct(folder: Path, name: str, extra: dict[str, Any], **settings: Any) -> dict[Any, Any]:
    """A connector in both roles, as an engine makes it; the worker's has the cache."""
    given = configure_shape(
        folder,
        SMALL,
        attention_backend="sparsekv",
        additional_config={
            "sparsekv": {"key_dtype": "int4", "value_dtype": "int3", "basis": "none"} | settings
        },
        max_model_len=1024,
        kv_transfer_config=KVTransferConfig(
            kv_connector=name, kv_role="kv_both", kv_connector_extra_config=extra
        ),
    )
    build_layers(given, dict.fromkeys(range(2), Layer()))
    groups = plan(given, 1 << 24).groups
    layout = given.cache_config.get_resolved_kv_cache_layout()
    with set_current_vllm_config(given):
        ensure_model_parallel_initialized(1, 1)
        made = {
            role: KVConnectorFactory.create_connector(given, role, groups)
            for role in (KVConnectorRole.SCHEDULER, KVConnectorRole.WORKER)
        }
        tensors = allocate_kv_cache(groups, torch.device("cpu"), layout)
        assert len(tensors) == 4, "pages and rings"
        made[KVConnectorRole.WORKER].register_kv_caches(tensors)
    return made


def moved(connector: Any) -> list[int]:
    """Bytes of what a worker's connector keeps or moves of a block."""
    if isinstance(connector, MultiConnector):
        return [size for child in connector._connectors for size in moved(child)]
    if isinstance(connector, OffloadingConnector):
        host = connector.connector_worker.worker
        return [cache.shape[1] for layers in host._groups for cache, _ in layers]
    return connector.connector_worker.block_len_per_layer


@pytest.mark.parametrize(
    ("name", "extra", "times"),
    [
        ("OffloadingConnector", HOST, 1),
        pytest.param("NixlConnector", {}, 1, marks=NIXL),
        pytest.param("NixlPullConnector", {}, 1, marks=NIXL),
        pytest.param("NixlPushConnector", {}, 1, marks=NIXL),
        (
            "MultiConnector",
            {
                "connectors": [
                    {
                        "kv_connector": "OffloadingConnector",
                        "kv_role": "kv_both",
                        "kv_connector_extra_config": HOST,
                    }
                ]
            },
            1,
        ),
        pytest.param(
            "MultiConnector",
            {
                "connectors": [
                    {
                        "kv_connector": "OffloadingConnector",
                        "kv_role": "kv_both",
                        "kv_connector_extra_config": HOST,
                    },
                    {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
                ]
            },
            2,
            marks=NIXL,
        ),
    ],
)
def test_what_is_carried_is_pages_and_no_window(tmp_path, worker, name, extra, times):
    made = construct(tmp_path, name, extra)
    assert moved(made[KVConnectorRole.WORKER]) == [PAGE] * 2 * times
    for connector in made.values():
        connector.shutdown()


@NIXL
@pytest.mark.parametrize("name", ["NixlConnector", "NixlPushConnector"])
def test_nixl_tells_pages_and_moved_windows_apart(tmp_path, worker, name):
    def compatibility(extra, **settings):
        made = construct(tmp_path, name, extra, **settings)
        found = made[KVConnectorRole.WORKER].connector_worker.compat_hash
        for connector in made.values():
            connector.shutdown()
        return found

    move = {"move_window": True}
    first = compatibility({})
    assert first == compatibility({}, window=8) == compatibility({"move_window": False})
    others = [compatibility({}, key_dtype="int3", value_dtype="int4"), compatibility(move)]
    others += [compatibility(move, window=8), compatibility(move, window_dtype="int8")]
    assert len({first, *others}) == 5
    assert others[1] == compatibility(move, window=64)


def test_nixl_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(connectors, "is_nixl_available", lambda: False)
    assert "kv_connector='NixlConnector': needs the package nixl" in refusal("NixlConnector", {})


def test_lmcache_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(connectors, "find_spec", lambda name: None)
    message = refusal(None, kv_offloading_size=1, kv_offloading_backend="lmcache")
    assert message.count("kv_connector='LMCacheMPConnector': needs the package lmcache") == 1


@pytest.mark.skipif(not find_spec("lmcache"), reason="needs lmcache, pip install lmcache")
@pytest.mark.parametrize("module_path", [None, connectors.LMCACHES_MODULE])
def test_lmcache_becomes_ours_under_its_name(module_path):
    config = admitted(connectors.LMCACHE, {"lmcache.mp.port": 1}, module_path=module_path)
    assert config.kv_connector_module_path == "vllm_sparsekv.engine.transfer.lmcache"
    assert config.kv_connector_extra_config.keys() == {"lmcache.mp.port", ORIGIN}
    lmcaches = importlib.import_module(connectors.LMCACHES_MODULE).LMCacheMPConnector
    assert issubclass(KVConnectorFactory.get_connector_class(config), lmcaches)
    assert "of a.b: is not known" in refusal(connectors.LMCACHE, {}, module_path="a.b")


def test_nixl_with_engines_of_other_pages_is_refused(monkeypatch):
    monkeypatch.setattr(connectors, "is_nixl_available", lambda: True)
    message = refusal("NixlConnector", {"enforce_handshake_compat": False})
    assert "enforce_handshake_compat=False: must be True" in message
    message = refusal("NixlConnector", {"move_window": "yes"})
    assert "kv_connector_extra_config.move_window='yes': must be true or false" in message


def test_nixl_becomes_ours_under_its_name(monkeypatch):
    monkeypatch.setattr(connectors, "is_nixl_available", lambda: True)
    for name in connectors.NIXL:
        config = admitted(name, {"num_threads": 2})
        assert (config.kv_connector, config.kv_connector_module_path) == (
            name,
            "vllm_sparsekv.engine.transfer.nixl",
        )
        assert config.kv_connector_extra_config.keys() == {"num_threads", ORIGIN}
        assert issubclass(
            KVConnectorFactory.get_connector_class(config),
            KVConnectorFactory.get_connector_class_by_name(name),
        )
