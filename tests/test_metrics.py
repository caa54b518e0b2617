"""What ``/metrics`` says of the cache, and how it gets there from the workers."""

from __future__ import annotations

import json
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from planning import Layer, build_layers, configure, plan
from prometheus_client import REGISTRY, CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.metrics.loggers import PrometheusStatLogger

import vllm_sparsekv
from vllm_sparsekv.engine.metrics import describe, measure
from vllm_sparsekv.kernels.api import kernel_name

ROOT = Path(vllm_sparsekv.__file__).parents[1]
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "max_position_embeddings": 8192,
    "vocab_size": 1024,
}
SETTINGS = {"key_dtype": "int4", "value_dtype": "int3", "basis": "none", "skip_layers": [-1]}
SPARSE = {"attention_backend": "sparsekv", "additional_config": {"sparsekv": SETTINGS}}
LAYERS = {0: Layer(), 1: Layer(window=256), 2: Layer(shares=1), 3: Layer()}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Of an engine with a full, a sliding, a sharing and a skipped layer, planned for 16 GiB."""
    config = configure(tmp_path, MODEL, max_model_len=4096, **SPARSE)
    build_layers(config, LAYERS)
    planned = plan(config)
    config.cache_config.kv_cache_size_tokens = planned.tokens
    return config


def test_bytes_of_a_rank(config: Any) -> None:
    """A token has 64 + 2 bytes of int4 keys and 48 + 2 of int3 values, 512 dense, in 2 heads."""
    found = measure(config)
    assert found["dense_token"] == 3 * 2 * 512
    assert found["token"] == 2 * 2 * 116 + 2 * 512
    assert found["kernels"] == kernel_name("cpu")
    assert config.cache_config.block_size == 144
    page = 144 * 2 * 116
    # 64 slots of 520 bytes in 2 heads, in whole pages.
    assert found["ring"] == 2 * 2 * page
    # 4,096 tokens; a sliding window's 256 and the 2,048 of a step; 4,096 in blocks of 32.
    assert found["request"] == found["ring"] + (29 + 17 + 128) * page
    assert found["dense_request"] == (29 + 17 + 29) * 144 * 2 * 512


def test_ranks_add_up(config: Any) -> None:
    rank = {"token": 100, "dense_token": 400, "ring": 7, "request": 1000, "dense_request": 3000}
    ranks = [rank | {"kernels": name} for name in ("native avx2", "native avx2")]
    config.cache_config.kv_cache_size_tokens = 900
    found = {metric.name: metric for metric in describe(config, ranks)}
    assert {name: metric.value for name, metric in found.items()} == {
        "config_info": 1,
        "token_bytes": 200,
        "dense_token_bytes": 800,
        "compression_ratio": 4.0,
        "ring_bytes": 14,
        "cache_tokens": 900,
        "dense_cache_tokens": 300,
    }
    assert found["config_info"].labels == {
        "key_sparsity": "0.0",
        "value_sparsity": "0.0",
        "key_dtype": "int4",
        "value_dtype": "int3",
        "window": "64",
        "window_dtype": "auto",
        "basis": "none",
        "basis_sha256": "None",
        "skip_layers": "(-1,)",
        "block_size": str(config.cache_config.block_size),
        "kernels": "native avx2",
        "version": vllm_sparsekv.__version__,
    }


@pytest.mark.parametrize("window", [None, 512])
def test_tokens_of_a_dense_cache_are_those_vllm_plans(tmp_path: Path, window: int | None) -> None:
    layers = {0: Layer(), 1: Layer(window=window), 2: Layer(), 3: Layer(window=window)}
    options = SPARSE | {"additional_config": {"sparsekv": SETTINGS | {"skip_layers": []}}}
    found = {}
    for name, given in (("sparse", options), ("dense", {})):
        config = configure(tmp_path / name, MODEL, max_model_len=4096, **given)
        build_layers(config, layers)
        config.cache_config.kv_cache_size_tokens = plan(config).tokens
        found[name] = config
    metrics = {m.name: m.value for m in describe(found["sparse"], [measure(found["sparse"])])}
    dense = found["dense"].cache_config.kv_cache_size_tokens
    assert metrics["cache_tokens"] > 3 * dense
    assert abs(metrics["dense_cache_tokens"] / dense - 1) < 0.02


def test_answers_travel_with_the_ready_message_and_are_published(config: Any) -> None:
    answers = [measure(config)]
    config.compilation_config.sparsekv_measured = answers
    config.cache_config.num_gpu_blocks = 10
    core = SimpleNamespace(
        vllm_config=config,
        engine_index=0,
        frontend_stats_publish_address=None,
        addresses=SimpleNamespace(coordinator_input=None, coordinator_output=None),  # vLLM 0.33
        scheduler=SimpleNamespace(get_kv_event_publisher_config=lambda: None),
    )
    payload = msgspec.msgpack.encode(EngineCoreProc._make_ready_response(core))
    del config.compilation_config.sparsekv_measured
    client = SimpleNamespace(
        vllm_config=config, _effective_attention_block_sizes=set(), stats_update_address=None
    )
    MPClient._apply_ready_response(client, payload)
    assert config.compilation_config.sparsekv_measured == answers
    for _ in range(2):  # the second engine of a process takes the place of the first
        PrometheusStatLogger(config, [0, 1]).log_engine_initialized()
    labels = {"model_name": config.model_config.served_model_name}
    for engine in ("0", "1"):
        value = REGISTRY.get_sample_value("sparsekv:token_bytes", labels | {"engine": engine})
        assert value == answers[0]["token"]


def test_several_front_ends_are_one_sample_each(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``--api-server-count 2``: each writes files, whoever is asked adds them up."""
    config.compilation_config.sparsekv_measured = [measure(config)]
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        logger = context.Process(
            target=lambda: PrometheusStatLogger(config, [0]).log_engine_initialized()
        )
        logger.start()
        logger.join()
        assert logger.exitcode == 0
    assert len(list(tmp_path.glob("gauge_mostrecent_*.db"))) == 2
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    found = {family.name: family.samples for family in registry.collect()}
    told = describe(config, config.compilation_config.sparsekv_measured)
    assert {f"sparsekv:{metric.name}" for metric in told} <= found.keys()
    for metric in told:
        (sample,) = found[f"sparsekv:{metric.name}"]
        assert sample.value == metric.value
        assert "pid" not in sample.labels


def test_board_and_page_name_the_metrics_there_are(config: Any) -> None:
    given = {f"sparsekv:{metric.name}" for metric in describe(config, [measure(config)])}
    board = (ROOT / "examples" / "grafana.json").read_text()
    assert len(json.loads(board)["panels"]) == 7
    page = (ROOT / "docs" / "pages" / "operating.md").read_text()
    assert set(re.findall(r"sparsekv:\w+", board)) == given
    assert set(re.findall(r"^\| `(sparsekv:\w+)`", page, re.MULTILINE)) == given
    PrometheusStatLogger(config, [0]).log_engine_initialized()
    vllms = {metric.name for metric in REGISTRY.collect()}
    assert set(re.findall(r"vllm:\w+", board)) <= vllms


def test_a_dense_engine_says_nothing(tmp_path: Path) -> None:
    config = configure(tmp_path, MODEL, max_model_len=4096)
    PrometheusStatLogger(config, [0]).log_engine_initialized()
    names = {metric.name for metric in REGISTRY.collect()}
    assert "vllm:cache_config_info" in names
    assert [name for name in names if name.startswith("sparsekv:")] == []
