"""The ragged matrix: the cases every implementation of the kernels must pass."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from helpers import CaseSpec, Request


def batches(block_size: int) -> dict[str, tuple[Request, ...]]:
    """The ragged batches of the matrix, by name."""
    n = block_size
    edges = (1, n - 1, n, n + 1)
    many = [edges[i % 4] + n * (i // 12) for i in range(31)]
    return {
        "few": (Request(17, 3), Request(5, 1)),
        "single": (Request(n + 1, 1),),
        "long": (Request(4095, 1), Request(0, 0), Request(4096, 1, hit=4096 - n)),
        "decode": tuple(Request(length - 1, 1) for length in (*edges, 5 * n + 3)),
        "hits": (
            Request(3 * n, 1, hit=3 * n),
            Request(3 * n + 5, 2, hit=3 * n - 7),
            Request(9, 1, 8),
        ),
        "33": (*(Request(c, 1, hit=c // 3) for c in many), Request(0, 1), Request(0, 0)),
        "prompts": tuple(Request(0, length) for length in edges),
        "chunks": (
            Request(n - 3, 2 * n + 1),
            Request(n, n),
            Request(2 * n + 1, 1),
            Request(7, 3, 7),
        ),
        "speculative": tuple(Request(c, 4, hit=c // 2) for c in (1, n - 2, n, 2 * n + 5)),
    }


AXES: dict[str, tuple[Any, ...]] = {
    "batch": tuple(name for name in batches(block_size=64) if name != "few"),
    "head_size": (64, 80, 96, 128, 256),
    "group": (1, 3, 4, 8),
    "block_size": (16, 64, 128),
    "codecs": (
        ("auto", "auto"),
        ("fp8", "fp8"),
        ("int4", "int4"),
        ("int4", "fp8"),
        ("fp8", "auto"),
    ),
    "sparsities": ((0.5, 0.5), (0.3, 0.5), (0.7, 0.3), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0)),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "window": (
        (0, 0, "auto"),
        (64, 0, "auto"),
        (24, 0, "auto"),
        (64, 3, "auto"),
        (64, 0, "int8"),
        (24, 3, "int8"),
    ),
}
"""What the matrix varies.

Codecs and sparsities are (key, value), a window is (window, lookahead, window_dtype).
"""


def pairwise(axes: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Few combinations in which every pair of values of two axes meets at least once."""
    names = list(axes)
    pairs = list(itertools.combinations(names, 2))
    missing = {
        (a, x, b, y) for a, b in pairs for x in range(len(axes[a])) for y in range(len(axes[b]))
    }
    rng = random.Random(0)
    while missing:
        a, x, b, y = min(missing)
        tries = [
            {name: rng.randrange(len(axes[name])) for name in names} | {a: x, b: y}
            for _ in range(50)
        ]
        covered = [{(c, t[c], d, t[d]) for c, d in pairs} & missing for t in tries]
        best = max(range(len(tries)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        yield {name: axes[name][i] for name, i in tries[best].items()}


def _spec(seed: int, chosen: dict[str, Any]) -> CaseSpec:
    return CaseSpec(
        requests=batches(chosen["block_size"])[chosen["batch"]],
        name=chosen["batch"],
        head_size=chosen["head_size"],
        num_kv_heads=1 + seed % 3,
        group=chosen["group"],
        block_size=chosen["block_size"],
        key_sparsity=chosen["sparsities"][0],
        value_sparsity=chosen["sparsities"][1],
        key_dtype=chosen["codecs"][0],
        value_dtype=chosen["codecs"][1],
        dtype=chosen["dtype"],
        window=chosen["window"][0],
        lookahead=chosen["window"][1],
        window_dtype=chosen["window"][2],
        padding=seed % 4,
        seed=seed,
        sliding_window=chosen.get("sliding_window"),
        soft_cap=chosen.get("soft_cap"),
        sinks=chosen.get("sinks", False),
    )


EMPTY = (
    CaseSpec((Request(0, 0), Request(0, 0)), "empty rows", padding=0),
    CaseSpec((Request(0, 0), Request(0, 0)), "empty rows", window=0, padding=5),
    CaseSpec((), "no requests", padding=2),
    CaseSpec((), "no requests", window=0, padding=0),
)


def matrix(axes: dict[str, tuple[Any, ...]]) -> tuple[CaseSpec, ...]:
    """A case for each combination of :func:`pairwise`; what is varied as in :data:`AXES`."""
    return tuple(_spec(seed, chosen) for seed, chosen in enumerate(pairwise(axes)))


RAGGED_MATRIX: tuple[CaseSpec, ...] = (*matrix(AXES), *EMPTY)
"""Every pair of values of :data:`AXES` in at least one case, and empty batches; use ``ids=str``."""

INT3_MATRIX = matrix(
    AXES
    | {
        "codecs": (("int3", "int3"), ("int4", "int3"), ("int3", "auto")),
        "sparsities": ((0.0, 0.0),),
    }
)
"""The same for int3."""

INT2_MATRIX = matrix(
    AXES
    | {
        "batch": ("decode", "hits", "prompts", "chunks", "speculative"),
        "head_size": (80, 128, 256),
        "group": (1, 3, 8),
        "codecs": (("int3", "int2"), ("int2", "int2"), ("auto", "int2")),
        "sparsities": ((0.0, 0.0),),
    }
)
"""Fewer for int2, which differs from int3 in its codes alone."""

INT4_INT2_MATRIX = matrix(
    AXES
    | {
        "batch": ("decode", "hits", "prompts", "chunks", "speculative"),
        "head_size": (64, 96, 128, 192, 256),
        "group": (1, 3, 8),
        "codecs": (("int4_int2", "int3"), ("int4_int2", "int2"), ("int4_int2", "auto")),
        "sparsities": ((0.0, 0.0),),
    }
)
"""The same for keys of two bands, in head sizes whose half is a multiple of 16."""

WHOLE_MATRIX = INT3_MATRIX + INT2_MATRIX + INT4_INT2_MATRIX
"""Cases of the codecs that store whole vectors only."""

_SCORES = AXES | {
    "head_size": (64, 96, 256),
    "group": (1, 3, 8),
    "sliding_window": (None, 1, 16, 64, 65, 4096),
    "soft_cap": (None, 1.5),
    "sinks": (False, True),
}
SCORE_MATRIX = matrix(_SCORES | {"sparsities": ((0.5, 0.5), (0.0, 0.0))}) + matrix(
    _SCORES
    | {
        "batch": ("decode", "hits", "chunks", "speculative"),
        "codecs": (("int4", "int3"), ("int3", "int2"), ("int2", "auto"), ("int4_int2", "int3")),
        "sparsities": ((0.0, 0.0),),
    }
)
"""Sliding windows against ours, soft caps and sinks, with every codec."""
