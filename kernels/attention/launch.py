"""Sizes of an attention launch, from tensor shapes and the device alone.

No length on the device is looked at, so that a launch captured in a CUDA graph stays right for
every batch of the same shape.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention.parts import parts
from vllm_sparsekv.kernels.triton import vectors

MIN_TILES = tl.constexpr(4)
"""History tiles that make a split worth its merge."""
MAX_ROWS = 32
"""Query rows of a program, unless one group of heads already has more."""
DENSE_TILE = 32
"""Step tokens read at once, half as many where registers are short."""


class Launch(NamedTuple):
    """Sizes of a launch, from shapes only.

    Attributes:
        rows: query rows of a program (tokens times heads of a group), a power of two >= 8.
        tile: history tokens unpacked at once.
        splits: parts each history is cut into.
        num_warps: warps of a program.
    """

    rows: int
    tile: int
    splits: int
    num_warps: int


def choose_launch(
    query: torch.Tensor,
    num_kv_heads: int,
    num_reqs: int,
    max_context: int,
    sliding_window: int | None = None,
) -> Launch:
    """Sizes for a step; looks at shapes and the device only.

    Args:
        query: (num_tokens, num_heads, D).
        max_context: tokens the block table has room for.
        sliding_window: as of the reference's ``sparse_attention``.
    """
    num_tokens, num_heads, size = query.shape
    group = num_heads // num_kv_heads
    step = triton.cdiv(num_tokens, num_reqs)
    wanted = triton.next_power_of_2(step * group)
    rows = max(min(wanted, MAX_ROWS), 8, triton.next_power_of_2(group))
    words = unpacks_words(size, query.element_size(), capability(query.device))
    tile, num_warps = tile_and_warps(rows, size, words)
    programs = (num_tokens // (rows // group) + num_reqs) * num_kv_heads
    if sliding_window is not None:
        max_context = min(max_context, sliding_window + step)
    useful = triton.cdiv(max_context, tile * MIN_TILES.value)
    splits = max(1, min(_max_programs(query.device) // programs, useful))
    return Launch(rows, tile, splits, num_warps)


def unpacks_words(size: int, itemsize: int, target: int) -> bool:
    """Whether a target, as :func:`capability` says it, unpacks with inline PTX."""
    return target >= 80 and itemsize == 2 and size % 32 == 0


def tile_and_warps(rows: int, size: int, words: bool = True) -> tuple[int, int]:
    """Tile and warps with the fewest instructions per element that do not spill.

    Two warps a program keep Triton from Hopper's warpgroup instructions, whose fences cost more
    than they save on so few rows.
    """
    wide = triton.next_power_of_2(size) > 128
    if rows <= 16:
        if words and size <= 96:
            return 64, 2
        return 32, 4 if wide and rows > 8 else 2
    return (32, 8) if wide or rows > MAX_ROWS else (64, 4)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> int:
    """Compute capability times 10; 0 for a GPU that is not NVIDIA's, 90 under the interpreter."""
    if device.type != "cuda":
        return 90
    if torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _max_programs(device: torch.device) -> int:
    """Programs that histories are split for, unless there are more even unsplit."""
    return 4 * _multiprocessors(device)


def workspace_elements(query: torch.Tensor, launch: Launch) -> int:
    """Float32 elements for the partial sums and log-sum-exps of the splits."""
    num_tokens, num_heads, size = query.shape
    return launch.splits * num_tokens * num_heads * (size + 1) if launch.splits > 1 else 0


def max_workspace_elements(device: torch.device, group: int, size: int) -> int:
    """The most :func:`workspace_elements` of any batch, for ``group`` query heads a KV head.

    Every split has a program, and a program no more than its rows of partial sums.
    """
    rows = max(MAX_ROWS, triton.next_power_of_2(group))
    return _max_programs(device) * rows * (size + 1)


def attend_constants(
    fmt: SparseFormat,
    group: int,
    block_size: int,
    slots_per_block: int,
    launch: Launch,
    target: int,
) -> dict[str, Any]:
    """Compile-time constants of the attention kernel for a target as :func:`capability` says it."""
    padded = triton.next_power_of_2(fmt.head_size)
    words = unpacks_words(fmt.head_size, fmt.dtype.itemsize, target)
    in_parts = words and launch.rows <= (16 if padded <= 128 else 8)
    part, rest = parts(fmt.head_size) if in_parts else (padded, 0)
    dense_tile = DENSE_TILE // 2 if rest and launch.rows > 8 else DENSE_TILE
    return {
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "SLOTS_PER_BLOCK": slots_per_block,
        "WINDOW": fmt.window,
        "D": fmt.head_size,
        "PADDED": padded,
        "PART": part,
        "REST": rest,
        "ROWS": launch.rows,
        "TILE": launch.tile,
        "DENSE_TILE": dense_tile,
        # Codes of int8 take registers on their way to the model dtype.
        "RING_TILE": DENSE_TILE // 2 if fmt.window_dtype == torch.int8 else dense_tile,
        **vectors(fmt, block_size),
        "WORDS": target if words else 0,
        "STAGES": 1,
    }


def attend_options(fmt: SparseFormat, launch: Launch, target: int) -> dict[str, int]:
    """Triton's own launch options for a target.

    Before compute capability 9.0 shared memory bounds the programs of a multiprocessor, so that
    fewer registers would only spill. From 9.0 on registers do, and the compiler does not take the
    168 that let 12 warps in unless it must. Two tiles to a head need more, and 16-bit survivors
    of a wide head take less on 10.0 and would spill.
    """
    options = {"num_warps": launch.num_warps}
    size = fmt.head_size
    narrow = launch.rows <= 8 and size <= 128 or launch.rows <= 16 and size <= 64
    if 80 <= target < 90:
        options["maxnreg"] = 255
    elif narrow and unpacks_words(size, fmt.dtype.itemsize, target):
        if parts(size)[1]:
            options["maxnreg"] = 255
        elif size <= 64 or target < 100 or fmt.key.codec.bits < 16:
            options["maxnreg"] = 168
    return options
