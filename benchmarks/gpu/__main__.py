"""Sparse pages on one GPU: decode kernels against dense and rival ones, then vLLM serving.

    python benchmarks/gpu                         # every cache, 1k to 128k tokens, batch 1 to 128
    python benchmarks/gpu --parts decode --contexts 8192 --batches 16 --caches fp8-50-50
    python benchmarks/gpu --dry-run               # tiny, on the CPU, interpreted, without times

Kernels need torch alone (its CUDA wheels bring triton); vLLM's kernels and the serving part run
where vLLM is installed. Every time is the median of graph replays, with p20 and p80, the L2 cache
flushed before each. GB/s count the compressed bytes a step has to read; the roofline is a measured
copy. JSON and PNG go to ``$OUT`` if set, otherwise to ``benchmarks/results``; see
``docs/pages/gpu.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    options = parse()
    if options.dry_run and "decode" in options.parts:
        import triton_interpreter  # noqa: F401  # before anything that defines a kernel
    from timing import machine

    device = torch.device("cpu" if options.dry_run else "cuda")
    result: dict[str, Any] = {"machine": machine(device), "dry_run": options.dry_run}
    print(result["machine"], flush=True)
    if "decode" in options.parts:
        run_decode(options, device, result)
    if "serving" in options.parts:
        run_serving(options, result)
    save(result, options.output)
    if result.get("decode") and not options.dry_run:
        draw(result, options.output.with_suffix(".png"))
    print(options.output)


def run_decode(options: argparse.Namespace, device: torch.device, result: dict[str, Any]) -> None:
    from decode import CACHES, DTYPE, Decode, Shape, instructions_per_element, measure_pack
    from rivals import dense_steps, fits
    from timing import copy_bandwidth, measure, measure_all
    from vllm_kernels import vllm_steps

    from vllm_sparsekv.format.layout import SparseFormat

    shape = Shape(options.heads, options.kv_heads, options.head_size, options.block_size)
    formats = {
        name: SparseFormat.from_config(CACHES[name], shape.head_size, DTYPE)
        for name in options.caches or CACHES
    }
    roofline = copy_bandwidth(device, options.repeats)
    result |= {
        "shape": asdict(shape),
        "copy_gb_per_s": roofline,
        "instructions_per_element": instructions_per_element(device),
        "relative_error": {},
        "pack": {},
        "decode": [],
    }
    for name, fmt in formats.items():
        smallest = Decode(shape, fmt, 2, options.contexts[0], device)
        result["relative_error"][name] = smallest.check()
        result["pack"][name] = measure_pack(shape, fmt, options.chunk, device, options.repeats)
    for context in options.contexts:
        for batch in options.batches:
            if not fits(shape, batch, context, device):
                print(f"context {context}, batch {batch}: the dense cache does not fit, skipped")
                continue
            where = (shape, batch, context, device)
            dense = measure_all(dense_steps(*where), device, options.repeats)
            others = measure_all(vllm_steps(*where), device, options.repeats)
            row = {"context": context, "batch": batch, "dense": dense, "vllm": others, "sparse": {}}
            for name, fmt in formats.items():
                decode = Decode(shape, fmt, batch, context, device)
                times = measure(decode.attend, device, options.repeats)
                row["sparse"][name] = summarize(times, decode.bytes_read(), dense, others, roofline)
                del decode
            result["decode"].append(row)
            print(json.dumps(row), flush=True)
            save(result, options.output)


def summarize(
    times: dict[str, float] | None,
    bytes_read: int,
    dense: dict[str, Any],
    others: dict[str, Any],
    roofline: float | None,
) -> dict[str, Any]:
    """Speed-up over the fastest bf16 kernel that ran, vLLM's included."""
    if times is None:
        return {"bytes": bytes_read, "times": None}
    bf16 = dense["times"] | {
        name: t for name, t in others["times"].items() if name in ("vllm-flash", "vllm-triton")
    }
    rate = bytes_read / times["median"] / 1e6
    fastest = min((t["median"] for t in bf16.values()), default=None)
    return {
        "bytes": bytes_read,
        "times": times,
        "gb_per_s": rate,
        "of_copy_bandwidth": rate / roofline,
        "speedup": fastest and fastest / times["median"],
    }


def run_serving(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if find_spec("vllm") is None:
        print("serving: vllm is not installed, skipped")
        return
    from serving import Load, engines, measure_serving

    if not options.dry_run:
        torch.cuda.empty_cache()  # the engines run beside this process
    load = Load(64, 2, 2, 4) if options.dry_run else Load(options.serving_context)
    result["serving"] = measure_serving(options.engines or list(engines()), load, options.dry_run)


def draw(result: dict[str, Any], path: Path) -> None:
    if find_spec("matplotlib") is None:
        print("no figure: matplotlib is not installed")
        return
    from plot import plot

    plot(result, path)
    print(path)


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks/gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no times")
    parser.add_argument(
        "--parts", nargs="+", choices=("decode", "serving"), default=["decode", "serving"]
    )
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--caches", nargs="+", help="keys of CACHES in decode.py")
    parser.add_argument("--engines", nargs="+", help="keys of engines() in serving.py")
    parser.add_argument("--serving-context", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--chunk", type=int, help="tokens of the prompt chunk that is packed")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, help="the JSON file")
    options = parser.parse_args()
    if options.dry_run:
        options.kv_heads, options.heads = 1, 4
    options.contexts = options.contexts or (
        [100, 200] if options.dry_run else [1024 << i for i in range(8)]
    )
    options.batches = options.batches or ([1, 2] if options.dry_run else [1, 4, 16, 64, 128])
    options.chunk = options.chunk or (16 if options.dry_run else 8192)
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    name = "gpu-dry-run.json" if options.dry_run else "gpu.json"
    options.output = options.output or folder / name
    return options


if __name__ == "__main__":
    main()
