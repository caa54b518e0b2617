"""Where the time of one layer's decode step goes on the CPU, against vLLM's own attention.

    python benchmarks/layer.py [--dtype bfloat16] [--shapes BATCHxCONTEXT ...] [--output FILE]

As many layers as a model has are stepped one after the other, each with caches and matrices of its
own, after reading as many bytes as the weights of one of them have: what a step finds in the
processor's caches is what it finds in an engine. Whole steps and steps that lack a part take turns;
a part's time is the difference of two medians.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine, save
from cpu import BLOCK_SIZE, Shape, dense_attention, dense_cache, format_of, sparse_memory
from vllm import _custom_ops as vllm_ops

from vllm_sparsekv.format.basis import Basis
from vllm_sparsekv.kernels import api

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = 30
WEIGHTS = 9 << 20
"""Bytes of a layer of SmolLM2-135M in bfloat16."""
ROUNDS = 40
SHAPES = ("4x128", "32x128", "4x512", "8x1024", "4x4096")

Call = Callable[[int], None]
"""The step of one layer."""


def basis_of(shape: Shape, feedback: bool) -> Basis:
    """One with matrices, means and, if wanted, feedback for each KV head."""
    square = (shape.kv_heads, shape.head_size, shape.head_size)
    key, query, value, output = torch.linalg.qr(torch.randn(4, *square)).Q
    means = torch.randn(2, *square[:2])
    if not feedback:
        return Basis(key, query, value, output, *means)
    matrices = torch.randn(2, *square).mul_(0.05).triu(shape.head_size // 8)
    return Basis(key, query, value, output, *means, *matrices)


def dense(shape: Shape, step: dict[str, torch.Tensor], slots: torch.Tensor) -> Call:
    """vLLM's own: the step's keys and values are written, then attended."""
    isa, attend = dense_attention(shape, step)
    caches = [dense_cache(shape) for _ in range(LAYERS)]

    def call(layer: int) -> None:
        vllm_ops.cpu_attn_reshape_and_cache(step["key"], step["value"], *caches[layer], slots, isa)
        attend(*caches[layer])

    return call


def sparse(shape: Shape, step: dict[str, torch.Tensor], slots: torch.Tensor) -> dict[str, Call]:
    """Attention alone, with packing and the ring, with the change of basis, and with feedback."""
    fmt, scale = format_of(shape, (0.0, 0.0, "int4", "int3")), shape.head_size**-0.5
    pages, windows, tables = zip(*(sparse_memory(shape, fmt) for _ in range(LAYERS)), strict=True)
    table = tables[0]
    where = step["query_start_loc"], step["seq_lens"], step["block_table"]
    vectors = step["query"], step["key"], step["value"]
    batch = api.Batch(*where, slots, table)

    attends = [api.Layer(fmt, Basis(), scale) for _ in range(LAYERS)]

    def attention(layer: int) -> None:
        memory = pages[layer], windows[layer], step["out"]
        kept = step["key"], step["value"]
        reads = step["query"], None, None
        api.step(attends[layer], batch, *reads, *memory, kept=kept, fills_window=False)

    def steps(basis: Callable[[], Basis]) -> Call:
        layers = [api.Layer(fmt, basis(), scale) for _ in range(LAYERS)]

        def call(layer: int) -> None:
            memory = pages[layer], windows[layer], step["out"]
            api.step(layers[layer], batch, *vectors, *memory)

        return call

    return {
        "attention": attention,
        "packing and ring": steps(Basis),
        "change of basis": steps(lambda: basis_of(shape, feedback=False)),
        "feedback": steps(lambda: basis_of(shape, feedback=True)),
    }


def measure(shape: Shape) -> dict[str, float]:
    """Microseconds a layer: dense, sparse, and what each part adds to those before it."""
    step = shape.step()
    blocks = step["block_table"][:, shape.context // BLOCK_SIZE].long()
    slots = blocks * BLOCK_SIZE + shape.context % BLOCK_SIZE
    calls = {"dense": dense(shape, step, slots)} | sparse(shape, step, slots)
    weights = [torch.ones(WEIGHTS // 4) for _ in range(LAYERS)]
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffle.sample([*calls], len(calls)):  # what was before leaves its traces
            call, spent = calls[name], 0.0
            for layer in range(LAYERS):
                weights[layer].sum()
                start = time.perf_counter()
                call(layer)
                spent += time.perf_counter() - start
            times[name].append(spent / LAYERS * 1e6)
    medians = {name: median(spent) for name, spent in times.items()}
    result = {"dense": medians.pop("dense"), "sparse": medians["feedback"]}
    before = 0.0
    for name, spent in medians.items():
        result[name], before = spent - before, spent
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="BATCHxCONTEXT")
    parser.add_argument("--output", type=Path, default=RESULTS / "layer.json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "microseconds": {}}
    for text in args.shapes:
        batch, _, context = text.partition("x")
        shape = Shape(64, getattr(torch, args.dtype), int(batch), int(context))
        found = result["microseconds"][f"{batch} x {context}"] = measure(shape)
        print(f"{text:>8}", *(f"{name} {value:.1f}" for name, value in found.items()), flush=True)
        save(args.output, result)


if __name__ == "__main__":
    main()
