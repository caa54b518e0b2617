"""Compiles the attention kernel for GPUs that are not there and reads the machine code.

Needs the triton package with its NVIDIA tools, no GPU and no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention import triton as attention
from vllm_sparsekv.kernels.attention.arguments import Pages, Partial, Ring, Vectors
from vllm_sparsekv.kernels.attention.launch import Launch, attend_constants, attend_options

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = {"sliding_window", "soft_cap", "sinks"}
ALIGNED = ":16"
"""Ends a type in a signature, as Triton's own ahead-of-time compiler has it."""
MANGLED = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Report:
    """What a compiled kernel costs.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread; 0 means nothing is spilled.
        spills_in_loops: loads and stores of local memory within loops.
        shared: bytes per program.
        per_element: instructions of a warp's lane per unpacked element, keys and values together,
            in the loop over whole tiles of the history.
        prefetches: that loop asks for the next block before its first matrix product.
        opcodes: the same by opcode.
    """

    registers: int
    stack: int
    spills_in_loops: int
    shared: int
    per_element: float
    prefetches: bool
    opcodes: dict[str, float]

    def __str__(self) -> str:
        most = ", ".join(f"{name} {count:.2f}" for name, count in self.opcodes.items())
        return (
            f"{self.per_element:.2f} instructions/element, {self.registers} registers, "
            f"{self.stack} bytes of stack ({self.spills_in_loops} accesses in loops), "
            f"{self.shared} bytes shared ({most})"
        )


def attention_report(
    fmt: SparseFormat,
    capability: int,
    launch: Launch,
    group: int = 4,
    block_size: int = 64,
    options: Collection[str] = (),
) -> Report:
    """Compile ``_attend`` ahead of time for a compute capability, times 10, and take it apart.

    Args:
        options: which of ``sliding_window``, ``soft_cap`` and ``sinks`` it is called with.

    Raises:
        RuntimeError: the loop over whole tiles cannot be told in the machine code.
    """
    arguments = _argument_types(fmt, launch)
    for name in OPTIONS - set(options):
        arguments[name] = None
    constants = attend_constants(fmt, group, block_size, 8, launch, capability)
    constants |= {name: None for name, kind in arguments.items() if kind is None}
    signature = {
        name: "constexpr" if name in constants else arguments[name]
        for name in attention._attend.arg_names
    }
    aligned = _aligned(tuple(signature.values()))
    source = ASTSource(
        attention._attend,
        {name: _without_alignment(kind) for name, kind in signature.items()},
        constants,
        {path: [["tt.divisibility", 16]] for path in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=attend_options(fmt, launch, capability),
    )
    elements = 2 * launch.tile * fmt.head_size / (32 * launch.num_warps)
    return _report(compiled, elements)


def resources(
    kernel: Any,
    pointers: dict[str, Any],
    constants: dict[str, Any],
    capability: int,
    num_warps: int,
) -> tuple[int, int]:
    """Registers a thread and bytes of stack of any kernel; arguments not named are int32.

    Args:
        pointers: types by name, of groups as tuples of their class; "constexpr" in one is None.
    """
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in kernel.arg_names
    }
    absent = {
        (i, j): None
        for i, kind in enumerate(signature.values())
        if isinstance(kind, tuple)
        for j, part in enumerate(kind)
        if part == "constexpr"
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants | absent),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", path).splitlines()[-1]
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def _argument_types(fmt: SparseFormat, launch: Launch) -> dict[str, Any]:
    """Of ``_attend``, with all options; aligned as at run time, None for what is not there.

    Base pointers and the strides of pages and vectors are multiples of 16.
    """
    model = "*" + MANGLED[fmt.dtype] + ALIGNED
    indices, stride = "*i32" + ALIGNED, "i32" + ALIGNED
    vectors = Vectors(model, stride, stride)
    window = "*" + MANGLED[fmt.window_dtype] + ALIGNED
    ring = Ring(window, "i32", "i32", "i32", indices, "i32", "i32", "i32", indices, "i32")
    partial = Partial("*fp32" + ALIGNED, "*fp32" + ALIGNED)
    return {
        **dict.fromkeys(("query", "key", "value", "out"), vectors),
        "pages": Pages("*u8" + ALIGNED, stride, stride, indices, "i32"),
        "ring": ring if fmt.window else None,
        "partial": partial if launch.splits > 1 else None,
        **dict.fromkeys(("query_start_loc", "seq_lens"), indices),
        **dict.fromkeys(("num_reqs", "num_tokens", "ring_slots", "sliding_window"), "i32"),
        **dict.fromkeys(("scale", "soft_cap"), "fp32"),
        "sinks": model,
    }


def _aligned(kind: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where in nested types aligned ones are."""
    if isinstance(kind, str):
        return [path] if kind.endswith(ALIGNED) else []
    return [found for i, part in enumerate(kind) for found in _aligned(part, (*path, i))]


def _without_alignment(kind: Any) -> Any:
    if isinstance(kind, str):
        return kind.removesuffix(ALIGNED)
    return type(kind)(*map(_without_alignment, kind))


def _report(compiled: Any, elements: float) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", path)
        listing = _run("nvdisasm", "-c", path)
    loops = _loops(listing)
    body = _history_loop(loops)
    products = [line for line in body if re.search(r"\b(HMMA|CCTL\.E\.PF2)\b", line)]
    counts = Counter(re.sub(r"^@!?U?P\w+ +", "", line).split()[0].split(".")[0] for line in body)
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage.splitlines()[-1])[1]),
        stack=int(re.search(r"STACK:(\d+)", usage.splitlines()[-1])[1]),
        spills_in_loops=sum(bool(re.search(r"\b(LDL|STL)\b", x)) for loop in loops for x in loop),
        shared=compiled.metadata.shared,
        per_element=len(body) / elements,
        prefetches="CCTL" in products[0],
        opcodes={name: count / elements for name, count in counts.most_common(12)},
    )


def _run(tool: str, *arguments: Any) -> str:
    command = [TOOLS / tool, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _loops(listing: str) -> list[list[str]]:
    """Instructions of every loop, by address of its first one."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", found[1])
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(instructions)))
            instructions.append(found[1])
    return [instructions[start : end + 1] for start, end in sorted(loops)]


def _history_loop(loops: list[list[str]]) -> list[str]:
    """The first loop with matrix products, which is the one over whole tiles."""
    for body in loops:
        if any("HMMA" in line for line in body):
            return body
    raise RuntimeError("no loop with matrix products found")
