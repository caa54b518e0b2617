"""Tensor parallelism in vLLM's Ray executors gives what one process gives, at sparsity 0."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import ray_engines
import ray_platform
import torch
from engines import LOSSLESS, engine, generate, texts

from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import BasisFile, write_basis

pytestmark = pytest.mark.usefixtures("engines_in_process")

SECONDS = 900


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another for each layer and head."""
    path = tmp_path_factory.mktemp("basis") / "basis.safetensors"
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index in range(4):
        matrices = torch.eye(32) + 0.05 * torch.randn(2, 2, 32, 32, generator=generator)
        layers[index] = LayerBasis(
            *matrices, *torch.randn(2, 2, 32, generator=generator), *torch.ones(2, 2, 32)
        )
    write_basis(path, layers, 4, "a-model")
    return path


@pytest.fixture(scope="module")
def settings(basis: Path) -> dict[str, Any]:
    """Of sparsity 0, quantised in the basis."""
    return {"preset": "quality", "window": 24, "basis": str(basis)}


def options(model: Path) -> dict[str, Any]:
    return {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 25,
    }


def prompts() -> list[list[int]]:
    """Longer than the window and than a block, and short."""
    return models.prompts(0, (200, 90, 7))


def texts_of_one_process(model: Path, settings: dict[str, Any] | None) -> list[list[int]]:
    with engine(settings, **options(model)) as llm:
        return texts(generate(llm, prompts(), ray_engines.MAX_TOKENS, detokenize=False))


@pytest.fixture(scope="module")
def answers(
    model: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Of engines on Ray, by case; vLLM's first executor, gone in 0.33, is asked for by class."""
    equal = {
        "executor": "ray",
        "settings": settings,
        "options": options(model),
        "prompts": prompts(),
    }
    first = "vllm.v1.executor.ray_executor"
    executor = f"{first}.RayDistributedExecutor" if importlib.util.find_spec(first) else "ray"
    other_window = options(model) | {"worker_cls": "ray_engines.OtherWindow"}
    asked = {
        "basis": equal,
        "none": equal | {"settings": LOSSLESS},
        "unequal": equal | {"executor": executor, "options": other_window},
    }
    folder = tmp_path_factory.mktemp("ray")
    (folder / "asked.json").write_text(json.dumps(list(asked.values())))
    run(folder)
    return dict(zip(asked, json.loads((folder / "answers.json").read_text()), strict=True))


def run(folder: Path) -> None:
    """Have :mod:`ray_engines` answer, in a session that ends with it."""
    ray_platform.entry_point(folder)
    path = [str(folder), str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(path),
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "RAY_worker_register_timeout_seconds": str(SECONDS),
        "RAY_health_check_failure_threshold": str(SECONDS),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    command = [sys.executable, "-m", "ray_engines", folder / "asked.json", folder / "answers.json"]
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        finally:
            end_session(process)
    assert status == 0, log.read_text()[-4000:]


def end_session(leader: subprocess.Popen) -> None:
    """End a program and all it started, which Ray puts into process groups of their own."""
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader.pid:
                psutil.Process(pid).kill()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    leader.wait()


def test_texts_are_those_of_a_dense_engine(answers, model):
    found = answers["none"]
    assert found.get("texts") == texts_of_one_process(model, None), found.get("error")


def test_with_a_basis_texts_are_those_of_one_process(answers, model, settings, basis):
    found = answers["basis"]
    assert found.get("texts") == texts_of_one_process(model, settings), found.get("error")
    assert len({worker["actor"] for worker in found["seen"]}) == ray_engines.RANKS
    means = BasisFile.open(basis).layer(0).key_mean
    for rank, worker in enumerate(found["seen"]):
        assert worker["platform"] == "RayCpuPlatform" and worker["layers"] == 4
        assert worker["ring"][1] == 1, "KV heads of a rank"
        assert worker["key_mean"] == means[rank : rank + 1].tolist()


def test_ranks_that_differ_are_refused(answers):
    error = answers["unequal"].get("error", "")
    refused = r"sparsekv.window=(24|32) here and (24|32) on another rank of the engine"
    found = re.search(refused, error)
    assert found and found[1] != found[2], error
