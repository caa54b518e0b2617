"""Pages that outlive the cache they were written in: host memory, files, other engines.

Engines run in this process, where one of a tiny model starts in two seconds.
"""

from __future__ import annotations

import errno
import math
import os
import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import models
import peers
import pytest
import torch
from engines import engine, first_logprobs, generate, metric, texts
from vllm import LLM, SamplingParams

from vllm_sparsekv.engine.transfer.files import SEAL, SealedFiles
from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import write_basis

pytestmark = pytest.mark.usefixtures("engines_in_process")

SETTINGS = {"basis": "none", "key_dtype": "int4", "value_dtype": "int3", "window": 24}
PROMPT, CACHED = 300, 256
"""Tokens, and those that fill blocks of 64."""
PAGES = 64 * 32 * 2 * 4
"""Bytes of a block: a token has 16 + 2 of int4 keys, 12 + 2 of int3 values, 2 heads, 4 layers."""
CHUNK = 4096 * math.ceil((PAGES + SEAL.size) / 4096)
"""Bytes of a block in host memory and in a file."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


def prompt(seed: int = 0, length: int = PROMPT) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, models.VOCABULARY) for _ in range(length)]


def plain_options(model: Path, settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Of an engine that keeps pages in its cache alone."""
    common = {
        "settings": settings,
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": 64,
        "kv_cache_memory_bytes": 1 << 26,
    }
    return common | options


def offloading_options(
    model: Path,
    folder: Path | None = None,
    settings: dict[str, Any] = SETTINGS,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Of an engine with host memory for its pages, and files in ``folder`` below it."""
    extra = {"cpu_bytes_to_use": 1 << 24} | (extra or {})
    if folder is not None:
        files = {"type": "fs", "root_dir": str(folder), "n_read_threads": 1, "n_write_threads": 1}
        extra["secondary_tiers"] = [files]
    connector = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return plain_options(model, settings, kv_transfer_config=connector, **options)


def plain(model: Path, settings: dict[str, Any], **options: Any) -> AbstractContextManager[LLM]:
    return engine(**plain_options(model, settings, **options))


def offloading(*args: Any, **options: Any) -> AbstractContextManager[LLM]:
    return engine(**offloading_options(*args, **options))


def ask(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """vLLM's answers, of a few tokens, once all that is offloaded has arrived where it goes."""
    outputs = generate(llm, prompts, 4, logprobs=20)
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step_fn()
    return outputs


def assert_same(actual: Any, expected: Any, error: float = 1e-5) -> None:
    """Log-probabilities of all candidates, and the text."""
    actual, expected = peers.described(actual), peers.described(expected)
    peers.assert_same(actual, expected, error)
    assert actual["text"] == expected["text"]


class Stored:
    """A folder that an engine has kept a prompt in, and what the engine said.

    Attributes:
        cold: the answer with nothing cached.
        hit: with the prompt's blocks in the engine's own cache.
    """

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.folder = folder
        with offloading(model, folder, **options) as llm:
            (self.cold,) = ask(llm, [prompt()])
            (self.hit,) = ask(llm, [prompt()])

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.bin"))


@pytest.fixture(scope="module")
def stored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(model, tmp_path_factory.mktemp("stored"))


def test_host_memory_keeps_what_the_cache_forgets(model: Path) -> None:
    with offloading(model) as llm:
        cold, hit = (ask(llm, [prompt()])[0] for _ in range(2))
        assert (cold.num_cached_tokens, hit.num_cached_tokens) == (0, CACHED)
        assert metric(llm, "vllm:kv_offload_store_bytes") == CACHED // 64 * PAGES
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
        assert restored.num_cached_tokens == CACHED
        assert metric(llm, "vllm:kv_offload_load_bytes") == CACHED // 64 * PAGES
        assert_same(restored, hit)
        assert llm.reset_prefix_cache()
        (beyond,) = ask(llm, [[*prompt(), *prompt(1)]])
        assert beyond.num_cached_tokens == CACHED


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_layers_with_sliding_windows(family: str, tmp_path: Path) -> None:
    """Alone, and beside layers that see everything."""
    model = models.build(family, tmp_path / "model")
    with offloading(model, tmp_path / "files") as llm:
        cold, hit = (ask(llm, [prompt()])[0] for _ in range(2))
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
        (beyond,) = ask(llm, [[*prompt(), *prompt(1)]])
    assert (cold.num_cached_tokens, hit.num_cached_tokens) == (0, CACHED)
    assert restored.num_cached_tokens == beyond.num_cached_tokens == CACHED
    assert_same(restored, hit)
    with offloading(model, tmp_path / "files") as llm:
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    assert_same(restored, hit)


def test_state_layers_come_back_too(tmp_path: Path) -> None:
    """At the end of a block, which has as many tokens as a state has bytes for.

    Twice as many where vLLM's CPU kernels take states in float32.
    """
    model = models.build("qwen3_next", tmp_path / "model", max_position_embeddings=8192)
    options = {
        "dtype": "bfloat16",
        "block_size": None,
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 1 << 28,
    }
    with offloading(model, **options) as llm:
        block = llm.llm_engine.vllm_config.cache_config.block_size
        tokens = prompt(length=block + 400)
        cold, hit = (ask(llm, [tokens])[0] for _ in range(2))
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [tokens])
    assert [answer.num_cached_tokens for answer in (cold, hit, restored)] == [0, block, block]
    assert_same(restored, hit)


def test_a_new_engine_finds_the_files(model: Path, stored: Stored) -> None:
    assert [path.stat().st_size for path in stored.files] == CACHED // 64 * [CHUNK]
    with offloading(model, stored.folder) as llm:
        restored, hit = (ask(llm, [prompt()])[0] for _ in range(2))
    assert restored.num_cached_tokens == hit.num_cached_tokens == CACHED
    for answer in (restored, hit):
        assert_same(answer, stored.hit)


def test_the_window_may_be_another(model: Path, stored: Stored) -> None:
    with offloading(model, stored.folder, SETTINGS | {"window": 8}) as llm:
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    # No window holds what was restored, so the first token does not depend on its length.
    restored, hit = first_logprobs(restored), first_logprobs(stored.hit)
    assert max(abs(restored[token] - hit[token]) for token in hit) <= 1e-5


def basis_file(path: Path, seed: int) -> str:
    """Random rotations for the tiny model."""
    generator = torch.Generator().manual_seed(seed)

    def rotation() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(2, 32, 32, generator=generator)).Q

    mean, reader = torch.zeros(2, 32), torch.ones(2, 32)
    layers = {
        index: LayerBasis(rotation(), rotation(), mean, mean, reader, reader) for index in range(4)
    }
    write_basis(path, layers, 4, "llama")
    return str(path)


@pytest.mark.parametrize("change", ["settings", "basis"])
def test_other_pages_of_the_same_size_are_not_found(
    model: Path, stored: Stored, tmp_path: Path, change: str
) -> None:
    folder, settings = stored.folder, dict(SETTINGS)
    if change == "settings":
        settings |= {"key_dtype": "int3", "value_dtype": "int4"}
    else:
        kept = settings | {"basis": basis_file(tmp_path / "kept.safetensors", 1)}
        stored = Stored(model, tmp_path / "files", settings=kept)
        folder = stored.folder
        with offloading(model, folder, kept) as llm:
            (restored,) = ask(llm, [prompt()])
        assert restored.num_cached_tokens == CACHED
        assert_same(restored, stored.hit)
        settings["basis"] = basis_file(tmp_path / "other.safetensors", 2)
    with offloading(model, folder, settings) as llm:
        (answer,) = ask(llm, [prompt()])
    with plain(model, settings) as llm:
        (cold,) = generate(llm, [prompt()], 4, logprobs=20)
    assert answer.num_cached_tokens == 0
    assert_same(answer, cold)


@pytest.mark.parametrize(
    "options",
    [{"block_size": 128}, {"dtype": "bfloat16"}, {"settings": SETTINGS | {"skip_layers": [1]}}],
    ids=lambda options: next(iter(options)),
)
def test_pages_of_another_size_are_not_found(
    model: Path, stored: Stored, options: dict[str, Any]
) -> None:
    with offloading(model, stored.folder, **options) as llm:
        cold, hit = (ask(llm, [prompt()])[0] for _ in range(2))
        assert (cold.num_cached_tokens, hit.num_cached_tokens) == (0, CACHED)
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    assert_same(restored, hit)


def test_damaged_files_are_computed_again(model: Path, tmp_path: Path) -> None:
    """As tests/test_transfer_tiers.py damages them in every way."""
    stored = Stored(model, tmp_path)
    for path in stored.files:
        path.write_bytes(random.Random(0).randbytes(path.stat().st_size))
    with offloading(model, tmp_path) as llm:
        answer, hit = (ask(llm, [prompt()])[0] for _ in range(2))
    assert answer.num_cached_tokens == 0
    assert_same(answer, stored.cold)
    assert_same(hit, stored.hit)
    with offloading(model, tmp_path) as llm:
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED, "the files were written again"
    assert_same(restored, stored.hit)


def test_a_full_disk_is_a_miss_later(
    model: Path, stored: Stored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*write: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with offloading(model, tmp_path) as llm:
        monkeypatch.setattr(SealedFiles, "_write", full)
        (answer,) = ask(llm, [prompt()])
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
        monkeypatch.undo()
        ask(llm, [prompt(1)])
    assert (answer.num_cached_tokens, restored.num_cached_tokens) == (0, CACHED)
    assert_same(restored, stored.hit)
    assert len(list(tmp_path.rglob("*.bin"))) == CACHED // 64
    with offloading(model, tmp_path) as llm:
        answers = [ask(llm, [prompt(seed)])[0] for seed in (0, 1)]
    assert [answer.num_cached_tokens for answer in answers] == [0, CACHED]
    assert_same(answers[0], stored.cold)


def test_what_host_memory_evicts_comes_back_from_files(model: Path, tmp_path: Path) -> None:
    """It holds one prompt of four."""
    extra = {"cpu_bytes_to_use": 5 * CHUNK}
    with offloading(model, tmp_path, extra=extra) as llm:
        hits = []
        for seed in range(4):
            _, hit = (ask(llm, [prompt(seed)])[0] for _ in range(2))
            hits.append(hit)
        assert llm.reset_prefix_cache()
        for seed, hit in enumerate(hits):
            (restored,) = ask(llm, [prompt(seed)])
            assert restored.num_cached_tokens == hit.num_cached_tokens == CACHED
            assert_same(restored, hit)


def test_a_request_aborted_while_its_pages_are_read(model: Path, stored: Stored) -> None:
    with offloading(model, stored.folder) as llm:
        params = SamplingParams(max_tokens=4)
        llm.llm_engine.add_request("gone", {"prompt_token_ids": prompt()}, params)
        llm.llm_engine.step()
        llm.llm_engine.abort_request(["gone"])
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    assert_same(restored, stored.hit)


def test_requests_that_share_a_prefix_restore_it_together(model: Path, stored: Stored) -> None:
    tails = [prompt(seed, 20 * seed) for seed in range(1, 7)]
    prompts = [[*prompt()[:CACHED], *tail] for tail in tails]
    with plain(model, SETTINGS) as llm:
        generate(llm, [prompt()], 1)
        expected = [generate(llm, [tokens], 4, logprobs=20)[0] for tokens in prompts]
    with offloading(model, stored.folder) as llm:
        answers = ask(llm, prompts)
    for answer, hit in zip(answers, expected, strict=True):
        assert answer.num_cached_tokens == hit.num_cached_tokens == CACHED
        assert_same(answer, hit)


def test_chunks_of_several_blocks(model: Path, stored: Stored) -> None:
    with offloading(model, extra={"blocks_per_chunk": 2}) as llm:
        ask(llm, [prompt()])
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    assert_same(restored, stored.hit)


def test_preempted_requests_come_back(model: Path, tmp_path: Path) -> None:
    """A crowd that outgrows the cache, restored from host memory, and from files by an engine."""
    crowd = [prompt(seed, 190) for seed in range(12)]
    options = {"num_gpu_blocks_override": 24}

    def check(llm: LLM) -> None:
        outputs = ask(llm, crowd)
        assert [output.num_cached_tokens for output in outputs] == [128] * len(crowd)
        assert texts(outputs) == alone

    with offloading(model, tmp_path, **options) as llm:
        ask(llm, crowd)
        alone = [texts(ask(llm, [tokens]))[0] for tokens in crowd]
        before = metric(llm, "vllm:num_preemptions")
        assert llm.reset_prefix_cache()
        check(llm)
        assert metric(llm, "vllm:num_preemptions") > before
    with offloading(model, tmp_path, **options) as llm:
        check(llm)
