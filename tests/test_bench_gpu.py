"""The GPU benchmark as far as it goes without a GPU: a dry run, its sums, its rivals' arguments."""

from __future__ import annotations

import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def times(median: float) -> dict[str, float]:
    return {"median": median, "p20": median, "p80": median}


def test_dry_run_of_the_kernels(tmp_path):
    output = tmp_path / "gpu.json"
    # Tokens from pages of 64 + 2 and 16 + 32 + 2 bytes or of 48 + 4 and 48 + 2, others from slots
    # of 16 bits or of int8; 2 requests.
    bytes_read = {
        "int4-0-50": 2 * (54 * (66 + 50) + 64 * 520),
        "int4_int2-int3-0-0": 2 * (6 * (52 + 50) + 112 * 264),
    }
    command = [sys.executable, FOLDER, "--dry-run", "--parts", "decode", "--output", output]
    command += ["--contexts", "118", "--batches", "2", "--caches", *bytes_read]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["dry_run"] and {"torch", "triton"} <= result["machine"]["versions"].keys()
    (row,) = result["decode"]
    for cache, expected in bytes_read.items():
        assert 0 < result["relative_error"][cache] < 1e-2
        assert row["sparse"][cache]["bytes"] == expected


def test_speedup_is_over_the_fastest_bf16_kernel():
    summarize = runpy.run_path(str(FOLDER / "__main__.py"))["summarize"]
    dense = {"times": {"sdpa-flash": times(4.0), "sdpa-cudnn": times(3.0)}}
    others = {"times": {"vllm-flash": times(2.0), "vllm-triton-fp8": times(0.5)}}
    row = summarize(times(1.0), 3_000_000_000, dense, others, roofline=4000.0)
    assert row["speedup"] == 2.0
    assert row["gb_per_s"] == 3000.0
    assert row["of_copy_bandwidth"] == 0.75
    assert summarize(None, 5, dense, others, None) == {"bytes": 5, "times": None}


def test_a_rival_that_fails_says_why():
    from timing import measure_all

    def broken() -> None:
        raise NotImplementedError("no such card\nmore")

    steps = {"fine": lambda: None, "broken": broken}
    result = measure_all(steps, torch.device("cpu"), 1)
    assert result == {
        "times": {"fine": None},
        "refused": {"broken": "NotImplementedError: no such card"},
    }


def test_vllm_kernels_take_these_arguments():
    turboquant = pytest.importorskip("vllm.v1.attention.ops.triton_turboquant_decode")
    unified = pytest.importorskip("vllm.v1.attention.ops.triton_unified_attention")
    from decode import Shape
    from vllm_kernels import TURBOQUANT, _Paged

    rival = _Paged(Shape(heads=8, kv_heads=2), 3, 40, torch.device("cpu"))
    arguments = rival.triton_arguments(torch.bfloat16)
    inspect.signature(unified.unified_attention).bind(**arguments)
    assert arguments["k"].shape == (9, 16, 2, 128)
    for name in TURBOQUANT:
        arguments = rival.turboquant_arguments(name)
        signature = inspect.signature(turboquant.triton_turboquant_decode_attention)
        signature.bind(**arguments)
        assert arguments["kv_cache"].dtype == torch.uint8


def test_a_full_cache_lasts_to_the_last_step():
    from serving import Load, full_batch

    load = Load(context=8192, batch=32, steps=64, most=1024)
    assert full_batch(10_000_000, load, 8192) == 1024
    # 90 requests: 8192 prompt tokens, 45 while the others are read, 64 timed.
    assert full_batch(90 * (8192 + 45 + 64), load, 8192) == 90
    assert full_batch(100, load, 8192) == 1


def test_every_preset_is_served():
    from serving import engines

    from vllm_sparsekv.settings import PRESETS

    names = set(engines())
    assert {f"sparse-{preset}" for preset in PRESETS} | {"dense", "dense-fp8"} <= names


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    from plot import plot

    def row(context: int, batch: int) -> dict:
        sparse = {"a": {"speedup": 2.0, "of_copy_bandwidth": 0.7}, "b": {"speedup": None}}
        return {"context": context, "batch": batch, "sparse": sparse}

    rows = [row(1024, 1), row(1024, 16), row(8192, 1), row(8192, 16), row(8192, 64)]
    machine = {"device": "none", "versions": {"torch": "2"}}
    plot({"machine": machine, "decode": rows}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
