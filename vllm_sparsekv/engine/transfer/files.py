"""vLLM's ``fs`` tier with a seal on every file, so that what disks do to pages is a miss.

vLLM reads a file for what its name says. A chunk ends in a seal of eight bytes, ``SKV1`` and the
CRC-32 of the chunk and the key it is filed under, in memory as in the file.

Files are written under names of their own and renamed, so that nobody reads half of one. Those
vLLM writes under are the same after every start, so what an engine was writing when it was killed
would be in the way of the next.
"""

from __future__ import annotations

import os
import struct
import time
import uuid
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vllm_sparsekv.engine.compat import init_logger
from vllm_sparsekv.engine.compat.transfer import (
    FileSystemTierManager,
    JobId,
    OffloadKey,
    TransferJob,
    batch_load_block,
)

SEAL = struct.Struct("<4sI")
MAGIC = b"SKV1"
ABANDONED = 3600
"""Seconds since an unfinished file was written to, after which nobody finishes it."""

logger = init_logger("vllm.sparsekv.transfer")  # below "vllm", so that vLLM's handlers print it


class SealedFiles(FileSystemTierManager):
    """``secondary_tiers: [{"type": "fs", "root_dir": ...}]``, for sparse pages."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"tier_type": "fs"})
        self._unfinished = Path(self.file_mapper.base_path) / "unfinished"
        self._unfinished.mkdir(exist_ok=True)
        self._remove_abandoned()

    def submit_store(self, job_metadata: TransferJob) -> None:
        job, keys = job_metadata, list(job_metadata.keys)
        if self.events is not None:
            self._store_job_keys[job.job_id] = keys
        self._job_block_counts[job.job_id] = len(keys)
        self._pool.enqueue_store(job.job_id, 1, [partial(self._store, keys, job.chunk_ids)])

    def submit_load(self, job_metadata: TransferJob) -> None:
        job, keys = job_metadata, list(job_metadata.keys)
        self._load_job_keys[job.job_id] = keys
        self._job_block_counts[job.job_id] = len(keys)
        load = partial(self._load, job.job_id, keys, job.chunk_ids)
        self._pool.enqueue_load(job.job_id, 1, [load])

    def shutdown(self) -> None:
        """Write what was given to be written, then stop."""
        self.drain_jobs()
        super().shutdown()

    def _store(self, keys: list[OffloadKey], chunks: np.ndarray) -> None:
        """Write the chunks that are not there.

        Raises:
            OSError: one cannot be written, for want of space, say; it and those after it will be
                misses.
        """
        for key, chunk in zip(keys, chunks, strict=True):
            path = self.file_mapper.get_file_name(key)
            if not os.path.exists(path):
                content, seal = self._chunk(chunk)
                seal[:] = _seal(key, content)
                self._write(path, self._whole(chunk))

    def _write(self, path: str, content: memoryview) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        unfinished = self._unfinished / uuid.uuid4().hex
        direct = os.O_DIRECT if self._use_o_direct else 0
        file = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY | direct, 0o644)
        try:
            try:
                written = os.write(file, content)
            finally:
                os.close(file)
            if written < len(content):
                raise OSError(f"{path}: only {written} of {len(content)} bytes could be written")
            os.replace(unfinished, path)
        except OSError:
            with suppress(OSError):
                os.remove(unfinished)
            raise

    def _remove_abandoned(self) -> None:
        """Of engines that were killed."""
        for file in self._unfinished.iterdir():
            with suppress(OSError):  # another engine was quicker
                if time.time() - file.stat().st_mtime > ABANDONED:
                    file.unlink()

    def _load(self, job_id: JobId, keys: list[OffloadKey], chunks: np.ndarray) -> None:
        """Read chunks up to the first that is missing or not what was written.

        Raises:
            OSError: there is one; it and those after it are misses. Damaged files are removed.
        """
        failure, read = None, len(keys)
        try:
            batch_load_block(
                [self.file_mapper.get_file_name(key) for key in keys],
                self._primary_kv_view,
                [int(chunk) * self._block_size for chunk in chunks],
                self._block_size,
                self._use_o_direct,
            )
        except OSError as error:
            failure, read = error, getattr(error, "num_succeeded", 0)
        damaged = [i for i in range(read) if not self._is_sealed(keys[i], int(chunks[i]))]
        for path in (self.file_mapper.get_file_name(keys[i]) for i in damaged):
            logger.warning("sparsekv: %s is damaged and removed, its tokens are computed", path)
            with suppress(OSError):
                os.remove(path)
        if damaged:
            failure = OSError(f"{len(damaged)} damaged files")
        if failure is not None:
            self._load_progress[job_id] = min([*damaged, read])
            raise failure

    def _is_sealed(self, key: OffloadKey, chunk: int) -> bool:
        content, seal = self._chunk(chunk)
        return seal == _seal(key, content)

    def _whole(self, chunk: int) -> memoryview:
        """A chunk in host memory, with its seal."""
        start = int(chunk) * self._block_size
        return self._primary_kv_view.cast("B")[start : start + self._block_size]

    def _chunk(self, chunk: int) -> tuple[memoryview, memoryview]:
        """A chunk in host memory, and its seal."""
        whole = self._whole(chunk)
        return whole[: -SEAL.size], whole[-SEAL.size :]


def _seal(key: OffloadKey, content: memoryview) -> bytes:
    return SEAL.pack(MAGIC, zlib.crc32(content, zlib.crc32(key)))
