"""What vLLM's two model runners hand to our kernels, through their own metadata code.

Their functions get the lengths and blocks of a known case, their buffers hold what another step
left, and batches are padded as for full CUDA graphs. vLLM's Triton kernels are interpreted.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compare import assert_attention, assert_same_bytes
from helpers import REFERENCE, CaseSpec, Request
from histories import build_case
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBuffers, prepare_pos_seq_lens
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.utils import AttentionGroup

from vllm_sparsekv.engine.backend import SparseKVBackend, SparseKVMetadataBuilder
from vllm_sparsekv.engine.window import RingSpec, WindowBackend, WindowMetadataBuilder

buffer_utils.is_uva_available = lambda: False
CPU = torch.device("cpu")
MAX_REQUESTS, MAX_TOKENS, MAX_LENGTH = 8, 64, 512
STALE = 4
"""Left in every buffer by an earlier step; as a block there is one."""
SPARSE, WINDOW = "model.layers.0.self_attn.attn", "sparsekv.window.0"


class Batch:
    """A step of a case, with padding requests of as many tokens as the others have at most.

    Attributes:
        blocks: by group and request, the blocks it owns.
        starts: as ``query_start_loc``, the padding empty.
    """

    def __init__(self, spec: CaseSpec, padding_requests: int) -> None:
        self.requests = len(spec.requests)
        self.tokens = sum(request.query for request in spec.requests)
        self.max_query = max(request.query for request in spec.requests)
        self.padded_requests = self.requests + padding_requests
        padding = padding_requests * self.max_query
        self.padded_tokens = self.tokens + padding
        self.case = build_case(replace(spec, padding=padding))
        self.contexts = np.array([request.context for request in spec.requests], dtype=np.int32)
        self.queries = np.array([request.query for request in spec.requests], dtype=np.int32)
        self.starts = np.full(MAX_REQUESTS + 1, self.tokens, dtype=np.int32)
        self.starts[: self.requests + 1] = self.case.query_start_loc
        lengths = (self.contexts + self.queries).tolist()
        pages = [-(-length // spec.block_size) for length in lengths]
        self.blocks = [
            [row[:n].tolist() for row, n in zip(self.case.block_table, pages, strict=True)],
            self.case.window_block_table.tolist(),
        ]
        self._make_groups(spec)

    def _make_groups(self, spec: CaseSpec) -> None:
        fmt = spec.format
        sizes = {"num_kv_heads": spec.num_kv_heads, "head_size": spec.head_size}
        pages = FullAttentionSpec(
            block_size=spec.block_size,
            dtype=torch.uint8,
            state_content_bytes=fmt.token_bytes,
            **sizes,
        )
        ring = RingSpec(
            block_size=spec.block_size,
            token_bytes=fmt.token_bytes,
            dtype=spec.dtype,
            state_content_bytes=fmt.slot_bytes,
            min_slots=fmt.min_ring_slots,
            dcp_sharded=False,
            **sizes,
        )
        self.specs = [pages, ring]
        self.config = KVCacheConfig(
            num_blocks=len(self.case.pages),
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec([SPARSE], pages), KVCacheGroupSpec([WINDOW], ring)],
        )
        self.groups = []
        for i, (backend, builder, name) in enumerate(
            (
                (SparseKVBackend, SparseKVMetadataBuilder, SPARSE),
                (WindowBackend, WindowMetadataBuilder, WINDOW),
            )
        ):
            group = AttentionGroup(backend, [name], self.specs[i], i)
            group.metadata_builders = [builder.__new__(builder)]
            group.metadata_builders[0].kv_cache_spec = self.specs[i]
            self.groups.append([group])

    def columns(self, v2: bool) -> list[int]:
        """Blocks in a row of each group's table."""
        config = SimpleNamespace(
            use_v2_model_runner=v2,
            parallel_config=SimpleNamespace(
                decode_context_parallel_size=1, prefill_context_parallel_size=1
            ),
        )
        return [spec.max_num_blocks_per_req(config, MAX_LENGTH) for spec in self.specs]


class RunnerV2:
    """The buffers of model runner V2; requests are in slots in an order of their own."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.tables = BlockTables(
            [spec.block_size for spec in batch.specs],
            MAX_REQUESTS,
            MAX_TOKENS,
            batch.columns(v2=True),
            CPU,
            slot_mapping_enabled=[spec.uses_slot_mapping for spec in batch.specs],
            dcp_sharded=[spec.dcp_sharded for spec in batch.specs],
        )
        self.inputs = InputBuffers(MAX_REQUESTS, MAX_TOKENS, CPU)
        for stale in (
            *self.tables.input_block_tables,
            self.tables.slot_mappings,
            self.inputs.positions,
            self.inputs.seq_lens,
        ):
            stale.fill_(STALE)

    def step(self) -> dict:
        batch, inputs = self.batch, self.inputs
        slots = torch.arange(MAX_REQUESTS).flip(0)[: batch.requests]
        for row, slot in enumerate(slots.tolist()):
            self.tables.append_block_ids(slot, tuple(group[row] for group in batch.blocks), True)
        self.tables.apply_staged_writes()
        inputs.query_start_loc.copy_(torch.from_numpy(batch.starts))
        starts = inputs.query_start_loc[: batch.padded_requests + 1]
        computed = torch.full((MAX_REQUESTS,), STALE, dtype=torch.int32)
        computed[slots] = torch.from_numpy(batch.contexts)
        prepare_pos_seq_lens(slots, starts, computed, inputs.positions, inputs.seq_lens)
        tables = self.tables.gather_block_tables(slots, batch.padded_requests)
        mappings = self.tables.compute_slot_mappings(
            slots, starts, inputs.positions, batch.padded_tokens
        )
        return self.metadata(tables, mappings)

    def capture(self) -> dict:
        tables = self.tables.get_dummy_block_tables(self.batch.padded_requests)
        mappings = self.tables.get_dummy_slot_mappings(self.batch.padded_tokens)
        return self.metadata(tables, mappings, for_cudagraph_capture=True)

    def metadata(self, tables, mappings, **options) -> dict:
        batch = self.batch
        return build_attn_metadata(
            batch.groups,
            batch.padded_requests,
            batch.padded_tokens,
            self.inputs.query_start_loc[: batch.padded_requests + 1],
            torch.from_numpy(batch.starts[: batch.padded_requests + 1]),
            batch.max_query,
            self.inputs.seq_lens,
            MAX_LENGTH,
            tables,
            mappings,
            batch.config,
            **options,
        )


class RunnerV1:
    """What model runner V1's metadata functions read of the runner.

    ``query_start_loc``, ``positions`` and ``seq_lens`` are set as ``_prepare_inputs`` does.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        tables = MultiGroupBlockTable(
            MAX_REQUESTS,
            MAX_TOKENS,
            False,
            CPU,
            [spec.block_size for spec in batch.specs],
            batch.columns(v2=False),
        )
        for table in tables.block_tables:
            table.block_table.np.fill(STALE)
            table.block_table.gpu.fill_(STALE)
            table.slot_mapping.gpu.fill_(STALE)
        buffer = CpuGpuBuffer(MAX_REQUESTS + 1, dtype=torch.int32, device=CPU, pin_memory=False)
        self.state = SimpleNamespace(
            kv_cache_config=batch.config,
            attn_groups=batch.groups,
            device=CPU,
            max_model_len=MAX_LENGTH,
            dcp_world_size=1,
            is_mm_prefix_lm=False,
            speculative_config=None,
            model_config=SimpleNamespace(rswa_window=None),
            cache_config=SimpleNamespace(use_replayssm=False, kv_sharing_fast_prefill=False),
            input_batch=SimpleNamespace(
                block_table=tables,
                num_computed_tokens_cpu_tensor=torch.zeros(MAX_REQUESTS, dtype=torch.int32),
                num_prompt_tokens_cpu_tensor=torch.zeros(MAX_REQUESTS, dtype=torch.int32),
            ),
            query_start_loc=buffer,
            positions=torch.full((MAX_TOKENS,), STALE),
            seq_lens=torch.full((MAX_REQUESTS,), STALE, dtype=torch.int32),
            optimistic_seq_lens_cpu=torch.zeros(MAX_REQUESTS, dtype=torch.int32),
            _get_encoder_seq_lens=lambda *args, **kwargs: (None, None),
        )

    def step(self) -> dict:
        batch, state = self.batch, self.state
        tables = state.input_batch.block_table
        for row in range(batch.requests):
            tables.add_row(tuple(group[row] for group in batch.blocks), row)
        tables.commit_block_table(batch.requests)
        state.query_start_loc.np[:] = batch.starts
        state.query_start_loc.copy_to_gpu()
        positions = [
            np.arange(c, c + q) for c, q in zip(batch.contexts, batch.queries, strict=True)
        ]
        state.positions[: batch.tokens] = torch.from_numpy(np.concatenate(positions))
        state.seq_lens.zero_()
        state.seq_lens[: batch.requests] = torch.from_numpy(batch.contexts + batch.queries)
        state.optimistic_seq_lens_cpu.copy_(state.seq_lens)
        tables.compute_slot_mapping(
            batch.requests,
            state.query_start_loc.gpu[: batch.requests + 1],
            state.positions[: batch.tokens],
        )
        return self.metadata()

    def capture(self) -> dict:
        return self.metadata(for_cudagraph_capture=True)

    def metadata(self, **options) -> dict:
        batch = self.batch
        mappings, _ = GPUModelRunner._get_slot_mappings(
            self.state, batch.padded_tokens, batch.padded_requests, batch.tokens
        )
        metadata, _ = GPUModelRunner._build_attention_metadata(
            self.state,
            batch.tokens,
            batch.requests,
            batch.max_query,
            batch.padded_tokens,
            batch.padded_requests,
            slot_mappings=mappings,
            **options,
        )
        return metadata


BATCHES = {
    "decode": (Request(70, 1), Request(5, 1), Request(130, 1)),
    "chunks": (Request(70, 1), Request(0, 9), Request(40, 7)),
    **{
        f"verify {drafted}": tuple(Request(context, 1 + drafted) for context in (70, 5, 127))
        for drafted in range(1, 8)
    },
}
UNIFORM = [name for name in BATCHES if name != "chunks"]


@pytest.fixture(params=[RunnerV1, RunnerV2], ids=["V1", "V2"])
def runner_of(request):
    return request.param


def batch_of(name: str, padding_requests: int) -> Batch:
    requests = BATCHES[name]
    lookahead = requests[0].query - 1 if name in UNIFORM else 0
    spec = CaseSpec(
        requests,
        num_kv_heads=2,
        key_sparsity=0.0,
        key_dtype="int4",
        value_dtype="int4",
        window=24,
        lookahead=lookahead,
    )
    return Batch(spec, padding_requests)


@pytest.mark.parametrize(
    ("name", "padding"), [("decode", 0), ("decode", 3), ("chunks", 0), ("verify 2", 2)]
)
def test_the_step_reaches_the_kernels(runner_of, name, padding):
    batch = batch_of(name, padding)
    case = batch.case
    metadata = runner_of(batch).step()
    step, ring = metadata[SPARSE], metadata[WINDOW].block_table
    real, rows = batch.requests, batch.padded_requests

    assert step.num_actual_tokens == batch.padded_tokens
    assert step.query_start_loc.tolist() == batch.starts[: rows + 1].tolist()
    assert step.seq_lens.tolist() == case.seq_lens.tolist() + [0] * padding
    assert step.slot_mapping.tolist() == case.slot_mapping.tolist()
    for row, blocks in enumerate(batch.blocks[0]):
        assert step.block_table[row, : len(blocks)].tolist() == blocks
    assert step.block_table.shape[0] == rows and not step.block_table[real:].any()
    assert ring.tolist() == batch.blocks[1] + [[0] * len(batch.blocks[1][0])] * padding

    ours = replace(
        case,
        query_start_loc=step.query_start_loc,
        seq_lens=step.seq_lens,
        slot_mapping=step.slot_mapping,
        block_table=step.block_table,
        window_block_table=ring,
    )
    assert_attention(ours)
    ours.write_step(REFERENCE)
    expected = batch_of(name, padding).case
    expected.write_step(REFERENCE)
    assert_same_bytes(ours.pages, expected.pages)
    assert_same_bytes(ours.window, expected.window)


@pytest.mark.parametrize("name", UNIFORM)
def test_replay_reads_what_capture_was_given(runner_of, name):
    """A graph keeps the addresses and shapes of capture."""
    runner = runner_of(batch_of(name, 2))
    captured = runner.capture()
    replayed = runner.step()
    pairs = [
        (getattr(captured[SPARSE], field), getattr(replayed[SPARSE], field))
        for field in ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
    ]
    pairs.append((captured[WINDOW].block_table, replayed[WINDOW].block_table))
    for before, after in pairs:
        assert before.data_ptr() == after.data_ptr()
        assert before.shape == after.shape and before.stride() == after.stride()


@pytest.mark.parametrize("name", BATCHES)
def test_rows_hold_every_position_runner_v1_looks_up(name):
    """V1 looks up ``position // block_size`` in every group's row, the ring's too."""
    batch = batch_of(name, 0)
    for spec, columns in zip(batch.specs, batch.columns(v2=False), strict=True):
        assert columns * spec.block_size >= MAX_LENGTH
    assert batch.columns(v2=True)[1] == len(batch.blocks[1][0])
