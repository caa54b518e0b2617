"""Decode over sparse pages against dense bf16 attention on one GPU; needs torch and triton only.

    python benchmarks/gpu.py                      # every codec, 1k to 128k tokens, batch 1 to 128
    python benchmarks/gpu.py --contexts 8192 --batches 16 --formats fp8-50
    python benchmarks/gpu.py --dry-run            # on the CPU, under Triton's interpreter, no times

Every figure is the median of graph replays, with p20 and p80, the L2 cache flushed before each
one. The dense rival is the fastest backend of torch's ``scaled_dot_product_attention`` and, where
installed, FlashAttention. GB/s count the compressed bytes a step has to read; the roofline is a
measured copy. Results go to ``$OUT`` if set, otherwise to ``benchmarks/results``; see
``benchmarks/GPU.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
if "--dry-run" in sys.argv:
    import triton_interpreter  # noqa: F401

import triton  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from vllm_sparsekv.config import SparseKVConfig  # noqa: E402
from vllm_sparsekv.format import SparseFormat  # noqa: E402
from vllm_sparsekv.kernels.attention import reference  # noqa: E402
from vllm_sparsekv.kernels.attention.triton import sparse_attention  # noqa: E402
from vllm_sparsekv.kernels.pack.triton import pack  # noqa: E402
from vllm_sparsekv.kernels.window.triton import write_window  # noqa: E402

FORMATS = {
    "auto-50": SparseKVConfig(0.5, 0.5, "auto", "auto", 64),
    "fp8-50": SparseKVConfig(0.5, 0.5, "fp8", "fp8", 64),
    "int4-30-50": SparseKVConfig(0.3, 0.5, "int4", "int4", 64),
    "int4-50": SparseKVConfig(0.5, 0.5, "int4", "int4", 64),
}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Shape:
    """The model's attention; Llama-3.1-8B's by default."""

    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    block_size: int = 64


def measure(step: Callable[[], Any], device: torch.device, repeats: int) -> Times | None:
    """Time a step by CUDA-graph replay; on the CPU only run it."""
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


def quantiles(milliseconds: list[float]) -> Times:
    low, median, high = torch.tensor(milliseconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return Times(median, low, high)


def copy_bandwidth(device: torch.device, repeats: int) -> float | None:
    """GB/s read plus written by a device-to-device copy far larger than the L2 cache."""
    size = 1 << 31 if device.type == "cuda" else 1 << 16
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure(lambda: target.copy_(source), device, repeats)
    return times and 2 * size / times.median / 1e6


class Decode:
    """One decode step of a batch whose pages hold packed random vectors, no two pages shared."""

    def __init__(
        self, shape: Shape, fmt: SparseFormat, batch: int, context: int, device: torch.device
    ) -> None:
        self.fmt = fmt
        size, heads = shape.block_size, shape.kv_heads
        self.slots = fmt.slots_per_block(size)
        ring_blocks = fmt.blocks_per_ring(self.slots)
        blocks = -(-(context + 1) // size)
        self.query = torch.randn(batch, shape.heads, fmt.head_size, dtype=DTYPE, device=device)
        self.key = torch.randn(batch, heads, fmt.head_size, dtype=DTYPE, device=device)
        self.value = torch.randn_like(self.key)
        self.pages = self._pages(1 + batch * blocks, shape, device)
        self.window = torch.zeros(
            1 + batch * ring_blocks,
            heads,
            self.slots,
            fmt.slot_bytes // DTYPE.itemsize,
            dtype=DTYPE,
            device=device,
        )
        order = torch.randperm(batch * blocks, device=device).int() + 1
        self.block_table = order.view(batch, blocks)
        ring = torch.arange(1, 1 + batch * ring_blocks, device=device, dtype=torch.int32)
        self.window_block_table = ring.view(batch, ring_blocks)
        self.query_start_loc = torch.arange(batch + 1, device=device, dtype=torch.int32)
        self.seq_lens = torch.full((batch,), context + 1, device=device, dtype=torch.int32)
        self._fill_window(batch, context, heads, device)
        self.slot_mapping = self.block_table[:, context // size].long() * size + context % size
        self.out = torch.empty_like(self.query)

    def _pages(self, count: int, shape: Shape, device: torch.device) -> torch.Tensor:
        size, heads = shape.block_size, shape.kv_heads
        pages = torch.empty(
            count, heads, size, self.fmt.token_bytes, dtype=torch.uint8, device=device
        )
        distinct = min(count, 64 if device.type == "cuda" else 2)
        tokens = distinct * size
        vectors = torch.randn(2, tokens, heads, self.fmt.head_size, dtype=DTYPE, device=device)
        pack(*vectors, torch.arange(tokens, device=device), pages, self.fmt)
        for start in range(distinct, count, distinct):
            end = min(start + distinct, count)
            pages[start:end] = pages[: end - start]
        return pages

    def _fill_window(self, batch: int, context: int, heads: int, device: torch.device) -> None:
        held = min(self.fmt.window, context)
        vectors = torch.randn(
            2, batch * held, heads, self.fmt.head_size, dtype=DTYPE, device=device
        )
        write_window(
            *vectors,
            self.window,
            self.query_start_loc * held,
            self.seq_lens - 1,
            torch.zeros(batch * held, dtype=torch.int64, device=device),
            self.window_block_table,
            self.fmt,
        )

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.value,
            self.pages,
            self.window,
            self.query_start_loc,
            self.seq_lens,
            self.block_table,
            self.window_block_table,
            self.fmt.head_size**-0.5,
            self.fmt,
            self.out,
        )

    def attend(self) -> None:
        sparse_attention(*self.arguments())

    def bytes_read(self, context: int) -> int:
        """Pages and window slots of one step."""
        batch, heads, _ = self.key.shape
        held = min(self.fmt.window, context)
        tokens = (context - held) * self.fmt.token_bytes + held * self.fmt.slot_bytes
        return batch * heads * tokens

    def check(self) -> None:
        """Against the torch reference, before anything is timed."""
        self.attend()
        actual = self.out.float()
        reference.sparse_attention(*self.arguments())
        error = (actual - self.out.float()).norm() / self.out.float().norm()
        assert error < 1e-2, f"relative error {error}"


def dense_step(
    shape: Shape, batch: int, context: int, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Rivals over a contiguous bf16 cache, by name."""
    size = (batch, shape.kv_heads, context + 1, shape.head_size)
    query = torch.randn(batch, shape.heads, 1, shape.head_size, dtype=DTYPE, device=device)
    key = torch.randn(size, dtype=DTYPE, device=device)
    value = torch.randn(size, dtype=DTYPE, device=device)

    def sdpa(backend: SDPBackend) -> Callable[[], Any]:
        def step() -> torch.Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    query, key, value, enable_gqa=True
                )

        return step

    rivals = {"sdpa-math": sdpa(SDPBackend.MATH)}
    if device.type == "cuda":
        rivals = {
            "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        }
        try:
            from flash_attn import flash_attn_with_kvcache
        except ImportError:
            pass
        else:
            cache = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
            rivals["flash-attn"] = lambda: flash_attn_with_kvcache(*cache)
    return rivals


def measure_dense(
    shape: Shape, batch: int, context: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Times of every rival that runs, why the others do not, and the fastest's name."""
    times, refused = {}, {}
    for name, step in dense_step(shape, batch, context, device).items():
        try:
            times[name] = measure(step, device, repeats)
        except RuntimeError as error:
            refused[name] = str(error).splitlines()[0]
    known = {name: t.median for name, t in times.items() if t}
    return {
        "times": {name: t and asdict(t) for name, t in times.items()},
        "refused": refused,
        "fastest": min(known, key=known.get) if known else None,
    }


def fits(shape: Shape, batch: int, context: int, device: torch.device) -> bool:
    """Whether the dense cache, by far the largest thing here, leaves half of the memory."""
    if device.type != "cuda":
        return True
    dense = 2 * batch * context * shape.kv_heads * shape.head_size * DTYPE.itemsize
    return 2 * dense < torch.cuda.get_device_properties(device).total_memory


def measure_pack(
    shape: Shape, fmt: SparseFormat, tokens: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Pruning and packing one prompt chunk of one layer."""
    key, value = torch.randn(2, tokens, shape.kv_heads, shape.head_size, dtype=DTYPE, device=device)
    pages = torch.empty(
        -(-tokens // shape.block_size),
        shape.kv_heads,
        shape.block_size,
        fmt.token_bytes,
        dtype=torch.uint8,
        device=device,
    )
    slots = torch.arange(tokens, device=device)
    times = measure(lambda: pack(key, value, slots, pages, fmt), device, repeats)
    return {"tokens": tokens, "times": times and asdict(times)}


def machine(device: torch.device) -> dict[str, Any]:
    about = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": torch._C._cuda_getDriverVersion(),
        }
    return about


def instructions_per_element(device: torch.device) -> dict[str, str] | None:
    """Counted in the machine code for this device; None in a dry run."""
    if device.type != "cuda":
        return None
    import sass

    from vllm_sparsekv.kernels.attention.launch import Launch, tile_and_warps

    major, minor = torch.cuda.get_device_capability(device)
    tile, num_warps = tile_and_warps(8, 128)
    launch = Launch(8, tile, 8, num_warps)
    return {
        name: str(
            sass.attention_report(
                SparseFormat.from_config(config, 128, DTYPE), 10 * major + minor, launch
            )
        )
        for name, config in FORMATS.items()
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cpu" if options.dry_run else "cuda")
    shape = Shape(options.heads, options.kv_heads, options.head_size, options.block_size)
    roofline = copy_bandwidth(device, options.repeats)
    result: dict[str, Any] = {
        "machine": machine(device),
        "dry_run": options.dry_run,
        "shape": asdict(shape),
        "copy_gb_per_s": roofline,
        "instructions_per_element": instructions_per_element(device),
        "pack": {},
        "decode": [],
    }
    print(result["machine"], "copy GB/s:", roofline, flush=True)
    formats = {
        name: SparseFormat.from_config(FORMATS[name], shape.head_size, DTYPE)
        for name in options.formats
    }
    for name, fmt in formats.items():
        Decode(shape, fmt, 2, options.contexts[0], device).check()
        result["pack"][name] = measure_pack(shape, fmt, options.chunk, device, options.repeats)
    for context in options.contexts:
        for batch in options.batches:
            if not fits(shape, batch, context, device):
                print(f"context {context}, batch {batch}: the dense cache does not fit, skipped")
                continue
            dense = measure_dense(shape, batch, context, device, options.repeats)
            row = {"context": context, "batch": batch, "dense": dense, "sparse": {}}
            for name, fmt in formats.items():
                decode = Decode(shape, fmt, batch, context, device)
                times = measure(decode.attend, device, options.repeats)
                row["sparse"][name] = summarize(times, decode.bytes_read(context), dense, roofline)
                del decode
            result["decode"].append(row)
            print(json.dumps(row), flush=True)
            save(result, options.output)
    return result


def summarize(
    times: Times | None, bytes_read: int, dense: dict[str, Any], roofline: float | None
) -> dict[str, Any]:
    if times is None:
        return {"bytes": bytes_read, "times": None}
    rate = bytes_read / times.median / 1e6
    fastest = dense["fastest"]
    return {
        "bytes": bytes_read,
        "times": asdict(times),
        "gb_per_s": rate,
        "of_copy_bandwidth": rate / roofline,
        "speedup": dense["times"][fastest]["median"] / times.median if fastest else None,
    }


def save(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, no times")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
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
    options = parse()
    save(run(options), options.output)
    print(options.output)
