"""Copies to host memory and sealed files, without an engine."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    OffloadKey,
    ReqContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from vllm_sparsekv.engine.transfer.connectors import ORIGIN
from vllm_sparsekv.engine.transfer.files import ABANDONED, SEAL, SealedFiles
from vllm_sparsekv.engine.transfer.host import HostWorker
from vllm_sparsekv.engine.transfer.spec import SparseKVOffloadingSpec

CHUNK = 4096
COUNT = 6


def offloading_config(tmp_path: Path, origin: str = "a", **extra: object) -> OffloadingConfig:
    return OffloadingConfig(
        groups=(OffloadingGroupConfig(64, ("layer",), 1),),
        worker_kv_bytes_per_block=CHUNK - SEAL.size,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": COUNT * CHUNK, ORIGIN: origin} | extra,
        engine_id=f"test-{tmp_path.name}",
        model=OffloadingModelConfig("model", "bfloat16"),
        cache=OffloadingCacheConfig(64, 1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, True),
    )


class Files:
    """The tier, and the host memory above it."""

    def __init__(self, tmp_path: Path, **config: object) -> None:
        spec = SparseKVOffloadingSpec(offloading_config(tmp_path, **config))
        assert (spec.num_chunks, spec.kv_bytes_per_chunk) == (COUNT, CHUNK)
        aligned = mmap.mmap(-1, COUNT * CHUNK)  # as direct I/O must have it
        self.memory = np.frombuffer(aligned, np.int8).reshape(COUNT, CHUNK)
        self.tier = SealedFiles(
            offloading_spec=spec,
            primary_kv_view=memoryview(self.memory),
            tier_type="SealedFiles",
            root_dir=str(tmp_path / "files"),
            n_read_threads=1,
            n_write_threads=1,
        )

    def path(self, key: OffloadKey) -> Path:
        return Path(self.tier.file_mapper.get_file_name(key))

    def unfinished(self) -> list[Path]:
        return list((Path(self.tier.file_mapper.base_path) / "unfinished").iterdir())

    def put(self, count: int) -> None:
        """The first chunks of ``CONTENT`` into memory."""
        self.memory[:] = 0
        self.memory[:count, : -SEAL.size] = CONTENT[:count]

    def holds(self, count: int) -> bool:
        return np.array_equal(self.memory[:count, : -SEAL.size], CONTENT[:count])

    def run(self, submit: Callable[[TransferJob], None], keys: list[OffloadKey]) -> JobResult:
        """A job over the first chunks, to its end."""
        submit(TransferJob(1, keys, np.arange(len(keys)), False, ReqContext("request")))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for result in self.tier.get_finished_jobs():
                return result
        raise AssertionError("the job did not end")


KEYS = [make_offload_key(bytes([index]) * 32, 1) for index in range(4)]
CONTENT = np.frombuffer(random.Random(0).randbytes(4 * CHUNK), np.int8).reshape(4, CHUNK)[
    :, : -SEAL.size
]


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Four chunks on disk, none in memory."""
    files = Files(tmp_path)
    files.put(4)
    assert files.run(files.tier.submit_store, KEYS).success
    files.memory[:] = 0
    yield files
    files.tier.shutdown()


def test_what_was_written_is_read(files: Files) -> None:
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.transfer_bytes) == (True, 4 * CHUNK)
    assert files.holds(4)
    assert files.tier.tier_type == "fs"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(CHUNK))


def fill(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(CHUNK))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)


def swap(path: Path) -> None:
    """A file of another key of the same tier."""
    path.write_bytes(max(path.parents[2].rglob("*.bin")).read_bytes())


def remove(path: Path) -> None:
    path.unlink()


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, zero, fill, flip_a_bit, swap, remove, make_a_folder],
    ids=lambda damage: damage.__name__,
)
def test_damaged_files_are_misses(files: Files, damage: Callable[[Path], None]) -> None:
    damage(files.path(KEYS[2]))
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.successful_keys) == (False, tuple(KEYS[:2]))
    assert files.holds(2)
    assert [files.path(key).is_file() for key in KEYS] == [True, True, False, True]
    if damage is make_a_folder:
        return
    files.memory[0, : -SEAL.size] = CONTENT[2]
    assert files.run(files.tier.submit_store, KEYS[2:3]).success
    files.memory[:] = 0
    assert files.run(files.tier.submit_load, KEYS).success
    assert files.holds(4)


def test_of_two_damaged_files_the_first_counts(files: Files) -> None:
    """vLLM's reads stop at the second; what they read before is checked all the same."""
    fill(files.path(KEYS[1]))
    truncate(files.path(KEYS[3]))
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.successful_keys) == (False, tuple(KEYS[:1]))


def test_all_files_that_were_read_and_are_damaged_are_removed(files: Files) -> None:
    for index in (1, 3):
        fill(files.path(KEYS[index]))
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.successful_keys) == (False, tuple(KEYS[:1]))
    assert [files.path(key).exists() for key in KEYS] == [True, False, True, False]


def test_a_longer_file_holds_what_was_written(files: Files) -> None:
    with files.path(KEYS[0]).open("ab") as file:
        file.write(b"more")
    assert files.run(files.tier.submit_load, KEYS).success
    assert files.holds(4)


def test_other_fingerprints_have_other_folders(files: Files, tmp_path: Path) -> None:
    other = Files(tmp_path, origin="b")
    assert files.path(KEYS[0]).is_file()
    assert not other.path(KEYS[0]).exists()
    other.tier.shutdown()


@pytest.fixture
def empty_files(tmp_path: Path) -> Iterator[Files]:
    """Four chunks in memory, none on disk."""
    files = Files(tmp_path)
    files.put(4)
    yield files
    files.tier.shutdown()


@pytest.mark.parametrize("how", ["refuses", "takes a part"])
def test_what_a_full_disk_does_not_take_is_a_miss(
    empty_files: Files, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """From the third chunk on."""
    files, write, written = empty_files, os.write, []

    def full(file: int, content: memoryview) -> int:
        written.append(len(content))
        if len(written) <= 2:
            return write(file, content)
        part = write(file, content[:1024])
        if how == "refuses":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return part

    monkeypatch.setattr(os, "write", full)
    assert not files.run(files.tier.submit_store, KEYS).success
    monkeypatch.undo()
    assert written == [CHUNK] * 3
    assert [files.path(key).exists() for key in KEYS] == [True, True, False, False]
    assert files.unfinished() == []
    files.memory[:] = 0
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.successful_keys) == (False, tuple(KEYS[:2]))
    assert files.holds(2)
    files.put(4)
    assert files.run(files.tier.submit_store, KEYS).success, "there is space again"
    files.memory[:] = 0
    assert files.run(files.tier.submit_load, KEYS).success
    assert files.holds(4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of sixteen pages."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only who may mount has a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_in_fact(small_disk: Path) -> None:
    files = Files(small_disk)
    try:
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
            file.write(bytes(1 << 16))
        files.put(4)
        assert not files.run(files.tier.submit_store, KEYS).success
        assert files.unfinished() == []
        assert not files.run(files.tier.submit_load, KEYS).success
        ballast.unlink()
        files.put(4)
        assert files.run(files.tier.submit_store, KEYS).success
        files.memory[:] = 0
        assert files.run(files.tier.submit_load, KEYS).success
        assert files.holds(4)
    finally:
        files.tier.shutdown()


def kill_while_it_writes(files: Files) -> None:
    """Another process with the same tier, at its first file, of which it has written half."""
    child = os.fork()
    if not child:
        write = os.write

        def die(file: int, content: memoryview) -> None:
            write(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        os.write = die
        files.tier._store(KEYS, np.arange(4))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_file_that_was_being_written_at_a_kill_is_a_miss(
    empty_files: Files, tmp_path: Path
) -> None:
    files = empty_files
    kill_while_it_writes(files)
    (half,) = files.unfinished()
    assert half.stat().st_size == CHUNK // 2
    result = files.run(files.tier.submit_load, KEYS)
    assert (result.success, result.successful_keys) == (False, None)
    files.put(4)
    assert files.run(files.tier.submit_store, KEYS).success, "nothing is in the way"
    files.memory[:] = 0
    assert files.run(files.tier.submit_load, KEYS).success
    assert files.holds(4)
    for age, left in ((ABANDONED - 600, [half]), (ABANDONED + 600, [])):
        then = time.time() - age
        os.utime(half, (then, then))
        Files(tmp_path).tier.shutdown()
        assert files.unfinished() == left


def test_two_engines_write_the_same_file_at_once(
    empty_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other, replace = empty_files, Files(tmp_path), os.replace
    other.put(4)
    unfinished = []

    def late(source: Path, path: str) -> None:
        """The second engine writes all before the first has one in its place."""
        monkeypatch.undo()
        stored = other.run(other.tier.submit_store, KEYS)
        unfinished.extend([stored.success, *one.unfinished()])
        replace(source, path)

    monkeypatch.setattr(os, "replace", late)
    assert one.run(one.tier.submit_store, KEYS).success
    assert unfinished[0] and len(unfinished) == 2
    assert one.unfinished() == []
    for files in (one, other):
        files.memory[:] = 0
        assert files.run(files.tier.submit_load, KEYS).success
        assert files.holds(4)
    other.tier.shutdown()


def test_shutdown_writes_what_is_queued(files: Files) -> None:
    keys = [make_offload_key(bytes([100 + index]) * 32, 1) for index in range(4)]
    for index, key in enumerate(keys):
        files.tier.submit_store(
            TransferJob(index, [key], np.array([index]), False, ReqContext("request"))
        )
    files.tier.shutdown()
    assert all(files.path(key).is_file() for key in keys)


def test_memory_for_less_than_a_chunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cpu_bytes_to_use=4095: must be >= 4096, one chunk of"):
        SparseKVOffloadingSpec(offloading_config(tmp_path, cpu_bytes_to_use=4095))


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_host_memory_gives_back_what_it_was_given(tmp_path: Path, per_chunk: int) -> None:
    """Two groups over two layers, one with padded pages; blocks from the middle of a chunk."""
    blocks, page, padded = 12, 48, 64
    caches = [
        torch.randint(-128, 128, (blocks, padded), dtype=torch.int8),
        torch.randint(-128, 128, (blocks, page), dtype=torch.int8),
    ]
    row = (page + padded) * per_chunk
    region = SharedOffloadRegion(f"test-{tmp_path.name}", 9, 0, CHUNK, row)
    worker = HostWorker(
        CanonicalKVCaches(
            [CanonicalKVCacheTensor(cache, cache.shape[1]) for cache in caches],
            [[CanonicalKVCacheRef(0, page)], [CanonicalKVCacheRef(1, page)]],
        ),
        per_chunk,
        region,
    )
    before = [cache.clone() for cache in caches]
    # Group 0: logical blocks 2 to 5 in blocks 7, 0, 3, 4; group 1: logical blocks 0 and 1.
    first = [2 // per_chunk + place for place in range(5 // per_chunk - 2 // per_chunk + 1)]
    second = [8, 7][: 1 // per_chunk + 1]
    cache_spec = GPULoadStoreSpec([7, 0, 3, 4, 9, 10], [4, 2], [2, 0])
    host_spec = CPULoadStoreSpec([*first, *second])
    assert worker.submit_store(1, cache_spec, host_spec)
    for cache in caches:
        cache.zero_()
    back = GPULoadStoreSpec([1, 2, 3, 4, 5, 6], [4, 2], [2, 0])
    assert worker.submit_load(2, host_spec, back)
    results = worker.get_finished()
    assert [(result.job_id, result.transfer_size) for result in results] == [
        (1, 6 * page),
        (2, 6 * page),
    ]
    assert worker.get_finished() == []
    assert torch.equal(caches[0][1:5, :page], before[0][[7, 0, 3, 4], :page])
    assert torch.equal(caches[1][5:7], before[1][[9, 10]])
    assert not caches[0][:, page:].any() and not caches[0][[0, 5, 6, 7]].any()
    worker.shutdown()
    region.cleanup()
    assert not Path(region.mmap_path).exists()
