"""A ragged paged batch and what it takes, for the tests of every implementation of the kernels.

:mod:`histories` builds the memory of a batch from its :class:`CaseSpec`; ``Case.expected`` is the
float64 answer of :mod:`oracle`. The cases every implementation must pass are in :mod:`ragged`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from oracle import as_read, dense_attention

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.attention import reference as attention_reference
from vllm_sparsekv.kernels.pack import reference as pack_reference
from vllm_sparsekv.kernels.window import reference as window_reference
from vllm_sparsekv.settings import SparseKVConfig

UNWRITTEN = 12345.0
"""What ``out`` holds before attention runs; exact in fp32, far from any answer in every dtype."""


class Ops(NamedTuple):
    """One implementation, signatures as in the ``reference.py`` of each kernel."""

    pack: Callable[..., None]
    sparse_attention: Callable[..., None]
    write_window: Callable[..., None]


REFERENCE = Ops(
    pack_reference.pack, attention_reference.sparse_attention, window_reference.write_window
)


class Request(NamedTuple):
    """One request of a batch.

    Attributes:
        context: tokens computed before this step.
        query: tokens of this step; 0 is an empty row.
        hit: leading context tokens found in the prefix cache: in pages, never in the ring.
    """

    context: int
    query: int
    hit: int = 0


@dataclass(frozen=True)
class CaseSpec:
    """A batch and its format; ``padding`` counts extra padding tokens in every token tensor."""

    requests: tuple[Request, ...]
    name: str = ""
    head_size: int = 64
    num_kv_heads: int = 2
    group: int = 2
    block_size: int = 64
    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    key_dtype: str = "auto"
    value_dtype: str = "auto"
    dtype: torch.dtype = torch.float32
    window: int = 64
    window_dtype: str = "auto"
    lookahead: int = 0
    padding: int = 3
    seed: int = 0
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    @property
    def format(self) -> SparseFormat:
        config = SparseKVConfig(
            self.key_sparsity,
            self.value_sparsity,
            self.key_dtype,
            self.value_dtype,
            self.window,
            self.window_dtype,
            basis="any" if CODECS[self.key_dtype].bands > 1 else "none",
        )
        return SparseFormat.from_config(config, self.head_size, self.dtype, self.lookahead)

    @property
    def history_tokens(self) -> int:
        """Context tokens of the whole batch."""
        return sum(request.context for request in self.requests)

    @property
    def tokens(self) -> int:
        """Of history and step, of the whole batch: what a slow interpreter pays for."""
        return self.history_tokens + sum(request.query for request in self.requests)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name}-D{self.head_size}-G{self.group}-N{self.block_size}-W{self.window}"
            f"{self.window_dtype.removeprefix('auto')}+{self.lookahead}"
            f"-K{self.key_sparsity}{self.key_dtype}"
            f"-V{self.value_sparsity}{self.value_dtype}-{dtype}"
            f"{f'-SW{self.sliding_window}' if self.sliding_window else ''}"
            f"{f'-cap{self.soft_cap}' if self.soft_cap else ''}{'-sinks' if self.sinks else ''}"
        )


@dataclass(frozen=True, eq=False)
class Case:
    """One attention step, ready to run; tensors as in ``kernels/attention/reference.py``.

    Attributes:
        keys: per request (context + query, num_kv_heads, D), every key unpruned, on the CPU.
        values: the same for values.
        slot_mapping: (num_tokens,) int64 of this step, -1 for the padding tokens. The step is not
            packed: its places in the pages are poison, as attention must not read them.
    """

    spec: CaseSpec
    fmt: SparseFormat
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pages: torch.Tensor
    window: torch.Tensor | None
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    window_block_table: torch.Tensor | None
    scale: float
    sinks: torch.Tensor | None

    @property
    def num_tokens(self) -> int:
        """Tokens of this step without padding."""
        return int(self.query_start_loc[-1])

    def attention_args(self) -> tuple[Any, ...]:
        """Arguments of ``sparse_attention`` up to ``out``."""
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
            self.scale,
            self.fmt,
        )

    def attention_options(self) -> dict[str, Any]:
        """Keyword arguments of ``sparse_attention``."""
        return {
            "sliding_window": self.spec.sliding_window,
            "soft_cap": self.spec.soft_cap,
            "sinks": self.sinks,
        }

    def attend(self, ops: Ops = REFERENCE) -> torch.Tensor:
        """Run the step: (num_tokens, num_heads, D). No padding row of ``out`` may be written."""
        out = torch.full_like(self.query, UNWRITTEN)
        untouched = out[self.num_tokens :].clone()
        ops.sparse_attention(*self.attention_args(), out, **self.attention_options())
        assert torch.equal(out[self.num_tokens :], untouched), "a padding row was written"
        return out[: self.num_tokens]

    def write_step(self, ops: Ops = REFERENCE) -> None:
        """What the backend does around attention: pack the step and put it into the window."""
        ops.pack(self.key, self.value, self.slot_mapping, self.pages, self.fmt)
        self.write_window(ops)

    def step(self, ops: Ops, out: torch.Tensor) -> None:
        """A layer's whole step, in the order of the backend."""
        ops.pack(self.key, self.value, self.slot_mapping, self.pages, self.fmt)
        ops.sparse_attention(*self.attention_args(), out)
        self.write_window(ops)

    def write_window(self, ops: Ops) -> None:
        if self.window is not None:
            ops.write_window(
                self.key,
                self.value,
                self.window,
                self.query_start_loc,
                self.seq_lens,
                self.slot_mapping,
                self.window_block_table,
                self.fmt,
            )

    @cached_property
    def expected(self) -> torch.Tensor:
        """(num_tokens, num_heads, D) float64 on the CPU: the attention rule, densely."""
        return self._attended(lambda values: values)

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        """``expected`` of absolute values: what relative errors of weights add up to at most."""
        return self._attended(torch.abs)

    def _attended(self, of_values: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rows = [torch.empty(0, *self.query.shape[1:], dtype=torch.float64)]
        start = 0
        for request, key, value in zip(self.spec.requests, self.keys, self.values, strict=True):
            query = self.query[start : start + request.query].cpu()
            held = max(request.context - self.spec.window, request.hit), request.context
            start += request.query
            rows.append(
                dense_attention(
                    query,
                    as_read(key, self.fmt.key, *held, self.spec.window_dtype),
                    of_values(as_read(value, self.fmt.value, *held, self.spec.window_dtype)),
                    self.scale,
                    self.spec.sliding_window,
                    self.spec.soft_cap,
                    None if self.sinks is None else self.sinks.cpu(),
                )
            )
        return torch.cat(rows)
