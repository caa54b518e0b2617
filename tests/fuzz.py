"""``make fuzz``: random settings, vectors, batches and basis files, until the time is up.

Each trial has a seed of its own; ``--seed`` with ``--seconds 0`` repeats the trials of that one.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import assert_same_bytes, attention_error
from helpers import REFERENCE, CaseSpec, Ops, Request
from histories import build_case

from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import BasisFile, write_basis
from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.kernels.cpu import build, ops
from vllm_sparsekv.settings import SETTING_NAMES, SparseKVConfig

NATIVE = Ops(ops.pack, ops.sparse_attention, ops.write_window)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**40, 0.5, 1.0, -0.0, math.nan, math.inf, -math.inf),
    *("", "auto", "none", "int4", "int4_int2", "INT4", "balanced", "sliding", "x" * 300, "\0"),
    *([], [0], [-1, "full"], ["both"], {}, {"a": 1}, b"int4", 1j),
)


def settings(rng: random.Random) -> None:
    """Taken, and then valid to build again; or refused in one line that names a setting."""
    names = (*SETTING_NAMES, "windw", "", 3)
    given = {rng.choice(names): rng.choice(ODD) for _ in range(rng.randint(0, 5))}
    try:
        config = SparseKVConfig.from_dict(given)
    except ValueError as error:
        assert str(error).startswith("sparsekv."), f"{given!r}: {error}"
        assert len(str(error).splitlines()) == 1, f"{given!r}: {error}"
    else:
        assert SparseKVConfig(**vars(config)) == config, given


def random_spec(rng: random.Random, requests: tuple[Request, ...], **chosen: Any) -> CaseSpec:
    """A format at random, for these requests."""
    key, value = rng.choice(list(CODECS)), rng.choice([x for x in CODECS if CODECS[x].bands == 1])
    sizes = (32, 64, 96, 128, 192, 256, 512) if CODECS[key].bands > 1 else range(16, 513, 16)
    head_size = rng.choice(sizes)
    most = 1 - 4 / head_size  # four elements survive
    sparsity = {
        f"{kind}_sparsity": rng.choice([0.0, rng.random() * most])
        for kind, codec in (("key", key), ("value", value))
        if not CODECS[codec].whole_only
    }
    return CaseSpec(
        requests,
        head_size=head_size,
        num_kv_heads=rng.randint(1, 3),
        group=rng.randint(1, 9),
        block_size=rng.choice([16, 32, 48, 64, 96, 128]),
        key_dtype=key,
        value_dtype=value,
        dtype=rng.choice(DTYPES),
        padding=rng.randint(0, 3),
        seed=rng.randrange(2**31),
        **{"key_sparsity": 0.0, "value_sparsity": 0.0} | sparsity | chosen,
    )


def vectors(rng: random.Random) -> None:
    """Any bits of the model's dtype are packed to the reference's bytes."""
    spec = random_spec(rng, ())
    fmt, tokens, heads = spec.format, 64, spec.num_kv_heads
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (tokens, heads, spec.head_size * spec.dtype.itemsize)
    bits = torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(spec.dtype)
    noise = torch.randn(bits.shape, generator=generator).to(spec.dtype)
    few = torch.rand(tokens, 1, 1, generator=generator) ** 3
    x = torch.where(torch.rand(noise.shape, generator=generator) < few, bits, noise)
    pages = [
        torch.full((2, heads, tokens, fmt.token_bytes), 0xFF, dtype=torch.uint8) for _ in range(2)
    ]
    slots = torch.randperm(2 * tokens, generator=generator)[:tokens]
    for implementation, memory in zip((NATIVE, REFERENCE), pages, strict=True):
        implementation.pack(x, x.flip(0), slots, memory, fmt)
    assert_same_bytes(*pages)


def attention(rng: random.Random) -> None:
    """A ragged batch of any options is as near to float64 as the reference is."""
    requests = []
    for _ in range(rng.randint(0, 6)):
        context = rng.choice([0, rng.randint(0, 70), rng.randint(0, 700)])
        query = rng.choice([0 if context == 0 else 1, 1, rng.randint(1, 80)])
        requests.append(Request(context, query, rng.choice([0, rng.randint(0, context)])))
    spec = random_spec(
        rng,
        tuple(requests),
        window=rng.choice([0, rng.randint(1, 100)]),
        window_dtype=rng.choice(["auto", "int8"]),
        lookahead=rng.choice([0, rng.randint(1, 5)]),
        sliding_window=rng.choice([None, rng.randint(1, 300)]),
        soft_cap=rng.choice([None, rng.uniform(0.5, 50)]),
        sinks=rng.random() < 0.3,
    )
    case, expected = build_case(spec, NATIVE), build_case(spec)
    assert_same_bytes(case.pages, expected.pages)
    budget = 4 * attention_error(expected) + 2 * torch.finfo(torch.float32).eps
    error = attention_error(case, NATIVE)
    assert error <= budget, f"{spec}: {error:.3g}, must be <= {budget:.3g}"


def basis_files(rng: random.Random, folder: Path) -> None:
    """A damaged file is refused in one line that names it, or read as what was written."""
    path = folder / "basis.safetensors"
    matrix, mean, reader = torch.eye(32).repeat(2, 1, 1), torch.zeros(2, 32), torch.ones(2, 32)
    layer = LayerBasis(matrix, matrix, mean, mean, reader, reader)
    write_basis(path, {0: layer}, 1, "model")
    content = bytearray(path.read_bytes())
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(rng.randint(1, 3)):
        how = rng.randrange(3)
        if how == 0:
            content[rng.randrange(min(head, len(content)))] = rng.randrange(256)
        elif how == 1:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        else:
            del content[rng.randrange(head, len(content)) :]
        if len(content) <= head:
            break
    path.write_bytes(content)
    try:
        file = BasisFile.open(path)
        file.check()
    except ValueError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1, error
    else:
        for layer in map(file.layer, file.shapes):
            assert all(tensor.isfinite().all() for tensor in layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first trial")
    args = parser.parse_args()
    done: Counter[str] = Counter()
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        kinds: list[tuple[Callable[..., None], tuple[Path, ...], int]] = [
            (settings, (), 200),
            (vectors, (), 5),
            (attention, (), 1),
            (basis_files, (Path(folder),), 20),
        ]
        seed = args.seed
        while not done or time.monotonic() < deadline:
            isas = build.supported_isas()
            ops.use_isa(isas[seed % len(isas)])
            for kind, arguments, repeats in kinds:
                for repeat in range(repeats):
                    try:
                        kind(random.Random(f"{seed} {kind.__name__} {repeat}"), *arguments)
                    except Exception as error:
                        where = f"{kind.__name__}, --seed {seed}, {isas[seed % len(isas)]}"
                        sys.exit(f"{where}: {type(error).__name__}: {error}")
                    done[kind.__name__] += 1
            seed += 1
    print(", ".join(f"{count:,} {name}" for name, count in done.items()), "without a failure")


if __name__ == "__main__":
    main()
