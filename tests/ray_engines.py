"""A program that starts engines on a Ray cluster of its own, and a worker for them.

``python -m ray_engines ASKED ANSWERS`` reads a list of ``{"executor": .., "settings": ..,
"options": .., "prompts": ..}`` and writes for each engine its ``texts`` and what is ``seen`` in its
workers, or the ``error`` that it ended with.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker.cpu_worker import CPUWorker

MAX_TOKENS = 24
RANKS = 2


class OtherWindow(CPUWorker):
    """As on a second node that was started with another window."""

    def load_model(self, **options: Any) -> None:
        if self.rank == 1:
            self.vllm_config.additional_config["sparsekv"]["window"] = 32
        super().load_model(**options)


def seen(worker: Any) -> dict[str, Any]:
    """What a worker is, and what it holds of the first layer."""
    from vllm.platforms import current_platform

    from vllm_sparsekv.engine.layers import sparse_layers

    layers = sparse_layers(worker.worker.vllm_config)
    cache = next(iter(layers.values())).impl.cache
    mean = cache.basis.key_mean
    return {
        "actor": ray.get_runtime_context().get_actor_id(),
        "platform": type(current_platform).__name__,
        "layers": len(layers),
        "ring": list(cache.window.kv_cache.shape),
        "key_mean": None if mean is None else mean.tolist(),
    }


def answer(
    executor: str, settings: Any, options: dict[str, Any], prompts: list[list[int]]
) -> dict[str, Any]:
    """``executor`` is vLLM's name of one, or the path of its class."""
    from engines import engine, generate, texts

    options |= {
        "tensor_parallel_size": RANKS,
        "distributed_executor_backend": (
            resolve_obj_by_qualname(executor) if "." in executor else executor
        ),
    }
    try:
        with engine(settings, **options) as llm:
            return {
                "texts": texts(generate(llm, prompts, MAX_TOKENS, detokenize=False)),
                "seen": llm.collective_rpc(seen),
            }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(asked: Path, answers: Path) -> None:
    engines = json.loads(asked.read_text())
    # vLLM asks for its node by this address, which must be the one that Ray takes.
    os.environ["VLLM_HOST_IP"] = ray.util.get_node_ip_address()
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            num_cpus=RANKS,
            num_gpus=RANKS * len(engines),  # an engine that has ended keeps its own reserved
            include_dashboard=False,
            object_store_memory=1 << 27,
            log_to_driver=False,
            _temp_dir=folder,
        )
        answers.write_text(json.dumps([answer(**engine) for engine in engines]))
        ray.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
