"""What a CUDA graph needs, without a GPU: launches fixed by shapes, nothing read back, no copies.

The wrappers run on meta tensors, which have no contents: whatever looked at a length would fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from vllm_sparsekv.engine.backend import SparseKVMetadataBuilder  # noqa: E402
from vllm_sparsekv.engine.compat import AttentionCGSupport  # noqa: E402
from vllm_sparsekv.engine.window import WindowMetadataBuilder  # noqa: E402
from vllm_sparsekv.format.layout import SparseFormat  # noqa: E402
from vllm_sparsekv.kernels.attention import launch  # noqa: E402
from vllm_sparsekv.kernels.attention import triton as attention  # noqa: E402
from vllm_sparsekv.kernels.pack import triton as pack  # noqa: E402
from vllm_sparsekv.kernels.window import triton as window  # noqa: E402
from vllm_sparsekv.settings import SparseKVConfig  # noqa: E402

HEADS, KV_HEADS, SIZE, BLOCK, MAX_BLOCKS = 32, 8, 128, 64, 512
H200 = 132
"""Multiprocessors."""


class Launches:
    """Stands in for a kernel: notes the grid and every argument that is not a tensor."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def launched(*arguments: Any, **constants: Any) -> None:
            self.seen.append((grid, list(_plain(arguments)), constants))

        return launched


def _plain(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for x in arguments:
        if isinstance(x, tuple):
            yield from _plain(x)
        elif not isinstance(x, torch.Tensor):
            yield x


@pytest.fixture
def launches(monkeypatch):
    seen = Launches()
    monkeypatch.setattr(attention, "_attend", seen)
    monkeypatch.setattr(attention, "merge_splits", seen)
    monkeypatch.setattr(pack, "_pack", seen)
    monkeypatch.setattr(window, "_write_window", seen)
    monkeypatch.setattr(launch, "_multiprocessors", lambda device: H200)
    return seen.seen


def step(
    requests: int, query_len: int, workspace: int | None = None, sliding_window: int | None = None
) -> None:
    """A uniform decode step of a padded batch: pack, attend, write the window."""
    fmt = SparseFormat.from_config(
        SparseKVConfig(0.0, 0.5, "int4", "int4", 64, "auto"),
        SIZE,
        torch.bfloat16,
        lookahead=query_len - 1,
    )
    slots = fmt.slots_per_block(BLOCK)
    tokens, ring = requests * query_len, fmt.blocks_per_ring(slots)

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, out = meta(tokens, HEADS, SIZE), meta(tokens, HEADS, SIZE)
    key, value = meta(tokens, KV_HEADS, SIZE), meta(tokens, KV_HEADS, SIZE)
    pages = meta(1000, KV_HEADS, BLOCK, fmt.token_bytes, dtype=torch.uint8)
    cells = meta(1000, KV_HEADS, slots, fmt.slot_elements)
    starts, lengths = meta(requests + 1, dtype=torch.int32), meta(requests, dtype=torch.int32)
    table = meta(requests, MAX_BLOCKS, dtype=torch.int32)
    window_table = meta(requests, MAX_BLOCKS, dtype=torch.int32)[:, :ring]
    mapping = meta(tokens, dtype=torch.int64)
    pack.pack(key, value, mapping, pages, fmt)
    attention.sparse_attention(
        query,
        key,
        value,
        pages,
        cells,
        starts,
        lengths,
        table,
        window_table,
        SIZE**-0.5,
        fmt,
        out,
        sliding_window=sliding_window,
        workspace=None if workspace is None else meta(workspace, dtype=torch.float32),
    )
    window.write_window(key, value, cells, starts, lengths, mapping, window_table, fmt)


@pytest.mark.parametrize("sliding_window", [None, 1024])
@pytest.mark.parametrize("query_len", range(1, 9))
@pytest.mark.parametrize("requests", [1, 7, 64, 512])
def test_launches_follow_from_shapes_alone(launches, requests, query_len, sliding_window):
    step(requests, query_len, sliding_window=sliding_window)
    first, launches[:] = list(launches), []
    step(requests, query_len, sliding_window=sliding_window)
    assert launches == first
    assert len(first) in (3, 4)


@pytest.mark.parametrize("sliding_window", [None, 1024])
@pytest.mark.parametrize("requests", [1, 3, 8, 64, 300, 2048])
@pytest.mark.parametrize("query_len", [1, 2, 5, 33])
def test_every_batch_fits_the_largest_workspace(launches, requests, query_len, sliding_window):
    largest = launch.max_workspace_elements(torch.device("meta"), HEADS // KV_HEADS, SIZE)
    assert largest == 4 * H200 * 32 * (SIZE + 1)
    step(requests, query_len, largest, sliding_window)


def test_few_variants_to_compile(launches):
    """Batch sizes share compiled kernels: no split count or batch size is a constant."""
    for requests in range(1, 65):
        step(requests, 1)
    constants = {str(sorted(c.items())) for _, _, c in launches if "TILE" in c}
    assert len(constants) <= 2


def test_one_request_fills_the_card(launches):
    step(1, 1)
    grids = [grid for grid, _, constants in launches if "TILE" in constants]
    assert H200 <= grids[0][0] * grids[0][1] * grids[0][2] <= 8 * H200


def test_a_sliding_window_is_split_no_further_than_pays(launches):
    """Into parts of at least 4 tiles; windows share a compiled kernel."""
    for sliding_window in (128, 1024, 4096):
        step(1, 1, sliding_window=sliding_window)
    attend = [(grid, constants) for grid, _, constants in launches if "TILE" in constants]
    assert [grid[2] for grid, _ in attend] == [2, 9, 33]
    assert len({str(sorted(constants.items())) for _, constants in attend}) == 1


def test_every_group_supports_full_graphs_of_uniform_batches():
    support = [b._cudagraph_support for b in (SparseKVMetadataBuilder, WindowMetadataBuilder)]
    assert support == [AttentionCGSupport.UNIFORM_BATCH, AttentionCGSupport.ALWAYS]


def test_metadata_stays_in_the_runner_s_own_buffers():
    """Replay reads the addresses of capture, so nothing may be a copy."""
    common = SimpleNamespace(
        num_actual_tokens=4,
        query_start_loc=torch.zeros(5, dtype=torch.int32),
        seq_lens=torch.zeros(4, dtype=torch.int32),
        block_table_tensor=torch.zeros(4, 9, dtype=torch.int32),
        slot_mapping=torch.zeros(4, dtype=torch.int64),
    )
    ours = SparseKVMetadataBuilder.build(None, 0, common)
    assert ours.query_start_loc is common.query_start_loc
    assert ours.seq_lens is common.seq_lens
    assert ours.block_table is common.block_table_tensor
    assert ours.slot_mapping is common.slot_mapping
    spec = SimpleNamespace(blocks_per_request=8)
    ring = WindowMetadataBuilder.build(SimpleNamespace(kv_cache_spec=spec), 0, common)
    assert ring.block_table.data_ptr() == common.block_table_tensor.data_ptr()
    assert ring.block_table.shape == (4, 8)


def test_compute_capability_is_read_from_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert launch.capability.__wrapped__(torch.device("cuda", 0)) == 90
    assert launch.capability.__wrapped__(torch.device("cpu")) == 90
