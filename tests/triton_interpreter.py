"""Fits Triton's interpreter for our kernels; import before any module that defines one.

It has no inline assembly; here :mod:`ptx_emulator` runs the kernels' own text. Its matrix product
takes the bits of bfloat16, which NumPy lacks, for integers; here it widens them. It patches
Triton's language for each call of a kernel's helper, which takes longer than most calls; here once,
for the whole process.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import ptx_emulator  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


def _widened(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    product = np.matmul(_widened(a), _widened(b))
    return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


class _Results:
    def __init__(self, handles: list[TensorHandle]) -> None:
        self.get_result = handles.__getitem__


def _inline_asm(self, text, constraints, values, types, is_pure, pack):
    if pack == 2:
        assert text == "mov.b32 $0, $1;"
        return _Results(values)
    shape = values[0].data.shape
    inputs = [value.data.reshape(-1) for value in values]
    results = []
    for raw, result_type in zip(ptx_emulator.run(text, inputs, len(types)), types, strict=True):
        scalar = result_type.scalar
        unsigned = raw.astype(f"u{scalar.primitive_bitwidth // 8}")
        results.append(TensorHandle(unsigned.view(_numpy_dtype(scalar)).reshape(shape), scalar))
    return _Results(results)


def _numpy_dtype(scalar: tl.dtype) -> type:
    return {tl.int32: np.int32, tl.float16: np.float16, tl.bfloat16: np.uint16}[scalar]


InterpreterBuilder.create_dot = _dot
InterpreterBuilder.create_inline_asm = _inline_asm

interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
