"""From workers to vLLM's ``/metrics``: what they say of their caches, as gauges of every front end.

Workers answer the engine once their caches are planned. The engine hands the answers on in the
message that tells each front end that it is ready, where Prometheus's registry is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import msgspec
from prometheus_client import REGISTRY
from vllm.config import VllmConfig

from vllm_sparsekv.engine.compat.config import is_admitted
from vllm_sparsekv.engine.compat.hooks import wrap_once

PREFIX = "sparsekv:"


class Metric(NamedTuple):
    """One gauge.

    Attributes:
        name: without ``PREFIX``.
        documentation: what it is, with the unit.
        value: the same for every engine of a front end.
        labels: besides the model's name and the engine's index.
    """

    name: str
    documentation: str
    value: float
    labels: dict[str, str] = {}


def watch_metrics(
    measure: Callable[[VllmConfig], dict[str, Any]],
    describe: Callable[[VllmConfig, list[dict[str, Any]]], list[Metric]],
) -> None:
    """Publish what ``describe`` makes of what ``measure`` finds.

    Args:
        measure: a module-level function; called in every worker of an admitted engine.
        describe: called in every front end with the answers, in the order of ranks.
    """
    from vllm.v1.engine import EngineCoreReadyResponse
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import MPClient
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    @dataclass(kw_only=True)
    class Ready(EngineCoreReadyResponse):
        sparsekv: list[dict[str, Any]]

    def ask_workers(original: Callable[..., Any]) -> Callable[..., Any]:
        def _initialize_kv_caches(self: Any, vllm_config: VllmConfig) -> Any:
            result = original(self, vllm_config)
            if is_admitted(vllm_config):
                _keep(vllm_config, self.model_executor.collective_rpc(_ask, args=(measure,)))
            return result

        return _initialize_kv_caches

    def hand_on(original: Callable[..., Any]) -> Callable[..., Any]:
        def _make_ready_response(self: Any) -> Any:
            ready, answers = original(self), _kept(self.vllm_config)
            if answers is None:
                return ready
            values = {field.name: getattr(ready, field.name) for field in fields(ready)}
            return Ready(**values, sparsekv=answers)

        return _make_ready_response

    def take(original: Callable[..., None]) -> Callable[..., None]:
        def _apply_ready_response(self: Any, payload: bytes) -> None:
            original(self, payload)
            answers = msgspec.msgpack.decode(payload).get("sparsekv") if payload else None
            if answers is not None:
                _keep(self.vllm_config, answers)

        return _apply_ready_response

    def publish(original: Callable[..., None]) -> Callable[..., None]:
        def log_engine_initialized(self: Any) -> None:
            original(self)
            _unregister()
            answers = _kept(self.vllm_config)
            for metric in describe(self.vllm_config, answers) if answers is not None else ():
                _set(metric, self)

        return log_engine_initialized

    wrap_once(EngineCore, "_initialize_kv_caches", ask_workers)
    wrap_once(EngineCoreProc, "_make_ready_response", hand_on)
    wrap_once(MPClient, "_apply_ready_response", take)
    wrap_once(PrometheusStatLogger, "log_engine_initialized", publish)


def _ask(worker: Any, measure: Callable[[VllmConfig], dict[str, Any]]) -> dict[str, Any]:
    return measure(worker.vllm_config)


def _keep(vllm_config: VllmConfig, answers: list[dict[str, Any]]) -> None:
    vllm_config.compilation_config.sparsekv_measured = answers


def _kept(vllm_config: VllmConfig) -> list[dict[str, Any]] | None:
    return getattr(vllm_config.compilation_config, "sparsekv_measured", None)


def _unregister() -> None:
    """Forget the gauges of an engine that was here before, as vLLM does its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)


def _set(metric: Metric, logger: Any) -> None:
    """With the gauges vLLM uses itself, which may be Ray's."""
    gauge = logger._gauge_cls(
        name=PREFIX + metric.name,
        documentation=metric.documentation,
        labelnames=["model_name", "engine", *metric.labels],
        # As all front ends of an engine say the same, several are one.
        multiprocess_mode="mostrecent",
    )
    model = logger.vllm_config.model_config.served_model_name
    for engine in logger.engine_indexes:
        gauge.labels(model_name=model, engine=str(engine), **metric.labels).set(metric.value)
