"""Settings of the whole test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from unittest import mock

# Each of several test processes keeps to some of the cores, and engines it starts inherit them;
# before torch is there, which takes a thread a core, as more of them wait for each other.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(worker[2:]) % len(cores) :: WORKERS])

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from vllm_sparsekv.kernels.cpu import build, ops  # noqa: E402

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("repeatable")


LONGEST = [
    "test_interpreted_kernels.py",
    "test_aot.py",
    "test_interpreted_engines.py",
    "test_engine_nixl.py",
    "test_engine_data_parallel.py",
    "test_engine_ray.py",
    "test_engine_calibrate.py",
    "test_serve.py",
    "test_engine_restart.py",
    "test_engine_families.py",
    "test_kernels_cpu.py",
    "test_build_cpu.py",
    "test_engine_exact.py",
    "test_engine_quality.py",
    "test_cli.py",
]
"""Those that take longest start first."""

QUICK = ["test_docs.py", "test_planning.py", "test_codecs.py", "test_format.py", "test_basis.py"]
"""A test process is given its next file when it begins one: these wait for the longest of all."""

SLOW = (
    "test_interpreted_kernels.py",
    "test_interpreted_engines.py",
    "test_aot.py",
    "test_build_cpu.py",
    "test_packaging.py",
    "test_bench_gpu.py",
)
"""Interpreters, compilers, installers and benchmarks at work."""


def _takes_long(item: pytest.Item) -> bool:
    """Whether it is one on a lesser instruction set than the best here, or of long histories."""
    chosen = item.callspec.params if hasattr(item, "callspec") else {}
    lesser = chosen.get("isa") not in (None, *build.supported_isas()[:1])
    return lesser or getattr(chosen.get("spec"), "name", "") == "long"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts engines, and what else is slow; ``make test-unit`` leaves both out."""
    for item in items:
        if item.path.name.startswith(("test_engine_", "test_serve")):
            item.add_marker("engine")
        elif item.path.name in SLOW or _takes_long(item):
            item.add_marker("slow")

    order = LONGEST[:WORKERS] + QUICK[:WORKERS] + LONGEST[WORKERS:]

    def place(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.name
        early = order.index(name) if name in order else len(order)
        return early, item.get_closest_marker("engine") is None

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """What a module's tests leave in the environment ends with them: other engines inherit it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def models_inspected_here() -> Iterator[None]:
    """vLLM starts a process for every architecture it has not seen, to keep CUDA out of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if registry := sys.modules.get("vllm.model_executor.models.registry"):
            patch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
        yield


@pytest.fixture(params=build.ISA_FLAGS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels on each instruction set of this machine."""
    if request.param not in build.supported_isas():
        pytest.skip(f"this machine does not run {request.param}")
    ops.use_isa(request.param)
    yield request.param
    ops.use_isa(None)


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For tests on small tensors, where waiting for a second thread costs ten times the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def engines_in_process() -> Iterator[None]:
    """For tests that start many engines of tiny models."""
    from engines import quick_starts

    with quick_starts(), pytest.MonkeyPatch.context() as patch:
        # vLLM compiles a few operators anew for every model and shape, for seconds each; so do the
        # processes that it starts.
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        with torch._dynamo.config.patch(disable=True):
            yield
