"""The native CPU kernels against vLLM's own CPU attention: same shapes, same process, in turn.

    python benchmarks/cpu.py [--quick] [--threads 2] [--output kernels.json]

Decode attention over context length and over sparsity and codec, one prompt chunk over pruned
history, and prune+pack of that chunk. Times are medians with p20 and p80 in milliseconds, of the
clock on the wall, or with one thread of that thread's own, which other processes disturb least; the
memory bandwidth is that of summing a large tensor in the same run. Results go to
``benchmarks/results/kernels.json`` and ``kernels.png``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, machine, save, summary
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels import api
from vllm_sparsekv.settings import SparseKVConfig

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK_SIZE = 64
FORMATS = {
    "50 % auto": (0.5, 0.5, "auto", "auto"),
    "50 % fp8": (0.5, 0.5, "fp8", "fp8"),
    "30/50 % int4": (0.3, 0.5, "int4", "int4"),
    "0/50 % int4": (0.0, 0.5, "int4", "int4"),
    "int4": (0.0, 0.0, "int4", "int4"),
    "int4/int3": (0.0, 0.0, "int4", "int3"),
    "int3": (0.0, 0.0, "int3", "int3"),
    "int3/int2": (0.0, 0.0, "int3", "int2"),
    "int4_int2/int3": (0.0, 0.0, "int4_int2", "int3"),
}
"""Sparsity of keys and of values, their codecs."""
HEADS = {64: (3, 3), 128: (2, 4)}  # head_size: KV heads, query heads per KV head


@dataclass(frozen=True)
class Shape:
    """One attention step: ``batch`` requests of ``query`` tokens after ``context`` others each."""

    head_size: int
    dtype: torch.dtype
    batch: int
    context: int
    query: int = 1

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"D={self.head_size} {dtype} batch={self.batch} context={self.context} "
            f"query={self.query}"
        )

    @property
    def kv_heads(self) -> int:
        return HEADS[self.head_size][0]

    @property
    def heads(self) -> int:
        return self.kv_heads * HEADS[self.head_size][1]

    @property
    def blocks(self) -> int:
        """Blocks of one request."""
        return -(-(self.context + self.query) // BLOCK_SIZE)

    def step(self) -> dict[str, torch.Tensor]:
        """The tensors that dense and sparse attention share."""
        tokens, generator = self.batch * self.query, torch.Generator().manual_seed(0)
        order = torch.randperm(self.batch * self.blocks, generator=generator) + 1
        return {
            "query": torch.randn(tokens, self.heads, self.head_size).to(self.dtype),
            "key": torch.randn(tokens, self.kv_heads, self.head_size).to(self.dtype),
            "value": torch.randn(tokens, self.kv_heads, self.head_size).to(self.dtype),
            "out": torch.empty(tokens, self.heads, self.head_size, dtype=self.dtype),
            "query_start_loc": (torch.arange(self.batch + 1) * self.query).int(),
            "seq_lens": torch.full((self.batch,), self.context + self.query).int(),
            "block_table": order.view(self.batch, self.blocks).int(),
        }


def clock() -> float:
    """Seconds; see the module's docstring."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def tiled(sample: torch.Tensor, blocks: int) -> torch.Tensor:
    """``blocks`` blocks of distinct memory that repeat the sample's."""
    return sample.repeat(-(-blocks // len(sample)), *[1] * (sample.dim() - 1))[:blocks].contiguous()


def dense_attention(
    shape: Shape, step: dict[str, torch.Tensor]
) -> tuple[str, Callable[[torch.Tensor, torch.Tensor], None]]:
    """vLLM's paged attention over caches of keys and values, and its instruction set."""
    isa = _get_attn_isa(shape.dtype, BLOCK_SIZE, shape.head_size)
    if isa == "amx":
        # An engine's first matrix product asks the system for the tile registers; here nobody has.
        torch.cpu._init_amx()
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.batch,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        seq_lens=step["seq_lens"],
        dtype=shape.dtype,
        query_start_loc=step["query_start_loc"],
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def attend(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=step["query"],
            key_cache=key_cache,
            value_cache=value_cache,
            output=step["out"],
            query_start_loc=step["query_start_loc"],
            seq_lens=step["seq_lens"],
            scale=shape.head_size**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step["block_table"],
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return isa, attend


def dense_cache(shape: Shape) -> tuple[torch.Tensor, ...]:
    """Keys and values of random numbers, as vLLM's CPU_ATTN backend keeps them."""
    sample = torch.randn(8, shape.kv_heads, 2 * BLOCK_SIZE, shape.head_size).to(shape.dtype)
    return tiled(sample, shape.batch * shape.blocks + 1).chunk(2, dim=2)


def dense(shape: Shape) -> Callable[[], None]:
    """vLLM's paged attention on the CPU, as its CPU_ATTN backend calls it."""
    _, attend = dense_attention(shape, shape.step())
    return partial(attend, *dense_cache(shape))


def format_of(shape: Shape, chosen: tuple[float, float, str, str]) -> SparseFormat:
    """With the window that presets have for such vectors."""
    names = ("key_sparsity", "value_sparsity", "key_dtype", "value_dtype")
    config = SparseKVConfig.from_dict(dict(zip(names, chosen, strict=True)))
    return SparseFormat.from_config(config, shape.head_size, shape.dtype)


def sparse_memory(shape: Shape, fmt: SparseFormat) -> tuple[torch.Tensor, ...]:
    """Pages that hold pruned random vectors, a full window, and the ring blocks of requests."""
    heads = shape.kv_heads
    sample = torch.zeros(8, heads, BLOCK_SIZE, fmt.token_bytes, dtype=torch.uint8)
    x = torch.randn(8 * BLOCK_SIZE, heads, shape.head_size).to(shape.dtype)
    api.pack(x, x.flip(0), torch.arange(len(x)), sample, fmt)
    pages = tiled(sample, shape.batch * shape.blocks + 1)

    slots = fmt.slots_per_block(BLOCK_SIZE)
    ring = fmt.blocks_per_ring(slots)
    table = (torch.arange(shape.batch * ring) + 1).view(shape.batch, ring).int()
    shape_of_rings = (shape.batch * ring + 1, heads, slots, fmt.slot_elements)
    window = torch.zeros(shape_of_rings, dtype=fmt.window_dtype)
    held = min(fmt.window, shape.context)
    newest = tiled(x, held * shape.batch)
    api.write_window(
        newest,
        newest,
        window,
        (torch.arange(shape.batch + 1) * held).int(),
        torch.full((shape.batch,), shape.context).int(),
        torch.zeros(held * shape.batch, dtype=torch.long),
        table,
        fmt,
    )
    return pages, window, table


def sparse(shape: Shape, fmt: SparseFormat) -> Callable[[], None]:
    """Our attention over what :func:`sparse_memory` gives."""
    step = shape.step()
    pages, window, window_table = sparse_memory(shape, fmt)

    def call() -> None:
        api.sparse_attention(
            step["query"],
            step["key"],
            step["value"],
            pages,
            window,
            step["query_start_loc"],
            step["seq_lens"],
            step["block_table"],
            window_table,
            shape.head_size**-0.5,
            fmt,
            step["out"],
        )

    return call


def compare(shape: Shape, formats: dict[str, tuple], rounds: int) -> dict:
    """Dense and every format in turn; with bytes per token and the bytes read per second."""
    fmts = {name: format_of(shape, chosen) for name, chosen in formats.items()}
    calls = {"dense": dense(shape)} | {name: sparse(shape, fmt) for name, fmt in fmts.items()}
    result: dict[str, Any] = interleaved(calls, rounds, clock)
    for name, row in result.items():
        fmt = fmts.get(name)
        any_format = next(iter(fmts.values()))
        token = fmt.token_bytes if fmt else any_format.dense_token_bytes
        row["bytes_ratio"] = any_format.dense_token_bytes / token
        history = shape.batch * shape.context * shape.kv_heads * token
        row["cache_gb_per_s"] = history / row["milliseconds"]["median"] / 1e6
        print(
            f"{shape}  {name:14} {row['milliseconds']['median']:9.3f} ms  "
            f"{row['cache_gb_per_s']:6.1f} GB/s  {row['speedup']['median']:5.2f}x "
            f"(bytes {row['bytes_ratio']:.2f}x)",
            flush=True,
        )
    return result


def pack_share(shape: Shape, attention: dict, rounds: int) -> dict:
    """Prune+pack of one prompt chunk, also as a share of its dense attention."""
    result = {}
    x = torch.randn(shape.query, shape.kv_heads, shape.head_size).to(shape.dtype)
    slots = torch.arange(shape.query)
    blocks = -(-shape.query // BLOCK_SIZE)
    for name, chosen in FORMATS.items():
        fmt = format_of(shape, chosen)
        pages = torch.zeros(blocks, shape.kv_heads, BLOCK_SIZE, fmt.token_bytes, dtype=torch.uint8)
        times = interleaved(
            {name: lambda p=pages, f=fmt: api.pack(x, x, slots, p, f)}, rounds, clock
        )
        row = {"milliseconds": times[name]["milliseconds"]}
        dense_time = attention["dense"]["milliseconds"]["median"]
        row["share_of_dense_attention"] = row["milliseconds"]["median"] / dense_time
        print(
            f"pack {name:14} {row['milliseconds']['median']:9.3f} ms for {shape.query} tokens, "
            f"{row['share_of_dense_attention']:.1%} of the chunk's dense attention"
        )
        result[name] = row
    return result


def read_bandwidth(rounds: int) -> dict[str, float]:
    """GB/s of summing 1 GiB, the roofline of anything that reads its input once."""
    x = torch.ones(1 << 28)
    rates = []
    for _ in range(rounds):
        start = clock()
        x.sum()
        rates.append(x.nbytes / (clock() - start) / 1e9)
    return summary(rates)


def plot(results: dict[str, Any], path: Path) -> None:
    """Time over context length per dtype, and the speed-up over sparsity per codec."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = results["decode"]
    figure, axes = plt.subplots(1, len(curves) + 1, figsize=(4.5 * (len(curves) + 1), 4))
    for axis, (title, by_context) in zip(axes, curves.items(), strict=False):
        contexts = [int(context) for context in by_context]
        for name in next(iter(by_context.values())):
            times = [row[name]["milliseconds"] for row in by_context.values()]
            (line,) = axis.plot(contexts, [t["median"] for t in times], marker="o", label=name)
            low, high = ([t[p] for t in times] for p in ("p20", "p80"))
            axis.fill_between(contexts, low, high, alpha=0.2, color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", title=title)
        axis.set_ylabel("decode attention, ms")
        axis.legend()
    for codec, rows in results["sparsity"]["codecs"].items():
        ratios = [row["speedup"]["median"] for row in rows.values()]
        axes[-1].plot([float(s) for s in rows], ratios, marker="o", label=codec)
    axes[-1].axhline(1, color="grey", linewidth=1)
    axes[-1].set(xlabel="sparsity", ylabel="speed-up on dense", title=results["sparsity"]["shape"])
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short contexts, few rounds")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contexts = [512, 2048] if args.quick else [512, 2048, 8192, 32768]
    rounds = 5 if args.quick else 11
    results: dict[str, Any] = {"machine": machine(), "read_gb_per_s": read_bandwidth(rounds)}
    print(f"read bandwidth {results['read_gb_per_s']['median']:.1f} GB/s", flush=True)

    results["decode"] = {}
    for head_size in HEADS:
        for dtype in (torch.float32, torch.bfloat16):
            curve = {}
            for context in contexts:
                shape = Shape(head_size, dtype, args.batch, context)
                curve[str(context)] = compare(shape, FORMATS, rounds * (3 if context < 8192 else 1))
            title = f"D={head_size} {str(dtype).removeprefix('torch.')} batch={args.batch}"
            results["decode"][title] = curve

    shape = Shape(128, torch.bfloat16, args.batch, contexts[-2])
    codecs: dict[str, dict] = {}
    for codec in ("auto", "fp8", "int4"):
        swept = {f"{s:g}": (s, s, codec, codec) for s in (0.0, 0.3, 0.5, 0.7)}
        rows = compare(shape, swept, rounds)
        codecs[codec] = {s: rows[s] for s in swept}
    results["sparsity"] = {"shape": str(shape), "codecs": codecs}

    chunk = Shape(64, torch.float32, 1, contexts[-2] // 2, query=512)
    results["prompt_chunk"] = {"shape": str(chunk), "attention": compare(chunk, FORMATS, rounds)}
    results["prompt_chunk"]["pack"] = pack_share(
        chunk, results["prompt_chunk"]["attention"], rounds
    )

    save(args.output, results)
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
