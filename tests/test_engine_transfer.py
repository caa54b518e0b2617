"""Pages that outlive the cache they were written in: host memory, files, other engines.

Engines run in this process, where one of a tiny model starts in two seconds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from engines import engine, first_logprobs, generate, metric, texts
from vllm import LLM

from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import write_basis

pytestmark = pytest.mark.usefixtures("engines_in_process")

SETTINGS = {"basis": "none", "key_dtype": "int4", "value_dtype": "int3", "window": 24}
PROMPT, CACHED = 300, 256
"""Tokens, and those that fill blocks of 64."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


def prompt(seed: int = 0, length: int = PROMPT) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, models.VOCABULARY) for _ in range(length)]


@contextmanager
def offloading(
    model: Path,
    folder: Path | None = None,
    settings: dict[str, Any] = SETTINGS,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[LLM]:
    """An engine with host memory for its pages, and files in ``folder`` below it."""
    extra = {"cpu_bytes_to_use": 1 << 24} | (extra or {})
    if folder is not None:
        files = {"type": "fs", "root_dir": str(folder), "n_read_threads": 1, "n_write_threads": 1}
        extra["secondary_tiers"] = [files]
    connector = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    options = {"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 26} | options
    with engine(
        settings, model=str(model), skip_tokenizer_init=True, kv_transfer_config=connector, **options
    ) as llm:
        yield llm


def ask(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """vLLM's answers, of a few tokens, once all that is offloaded has arrived where it goes."""
    outputs = generate(llm, prompts, 4, logprobs=20)
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():
        core.step_fn()
    return outputs


def assert_same(actual: Any, expected: Any, error: float = 1e-5) -> None:
    """Log-probabilities of all candidates, and the text."""
    actual_logprobs, expected_logprobs = first_logprobs(actual), first_logprobs(expected)
    assert actual_logprobs.keys() == expected_logprobs.keys()
    for token, logprob in expected_logprobs.items():
        assert abs(actual_logprobs[token] - logprob) <= error
    assert texts([actual]) == texts([expected])


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
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
        assert restored.num_cached_tokens == CACHED
        assert_same(restored, hit)
        assert llm.reset_prefix_cache()
        (beyond,) = ask(llm, [[*prompt(), *prompt(1)]])
        assert beyond.num_cached_tokens == CACHED


def test_bytes_moved_are_those_of_the_pages(model: Path) -> None:
    """A token has 16 + 2 bytes of int4 keys and 12 + 2 of int3 values in 2 heads of 4 layers."""
    with offloading(model) as llm:
        ask(llm, [prompt()])
        assert metric(llm, "vllm:kv_offload_store_bytes") == CACHED * 32 * 2 * 4
        assert llm.reset_prefix_cache()
        ask(llm, [prompt()])
        assert metric(llm, "vllm:kv_offload_load_bytes") == CACHED * 32 * 2 * 4


def test_a_new_engine_finds_the_files(model: Path, stored: Stored) -> None:
    assert len(stored.files) == CACHED // 64
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

    mean = torch.zeros(2, 32)
    layers = {index: LayerBasis(rotation(), rotation(), mean, mean) for index in range(4)}
    write_basis(path, layers, 4, "llama")
    return str(path)


@pytest.mark.parametrize("change", ["settings", "basis", "block size", "skipped", "dtype"])
def test_other_pages_are_not_found(
    model: Path, stored: Stored, tmp_path: Path, change: str
) -> None:
    first, second = dict(SETTINGS), dict(SETTINGS)
    options: dict[str, Any] = {}
    if change == "settings":  # pages of the same size
        second |= {"key_dtype": "int3", "value_dtype": "int4"}
    elif change == "basis":
        first["basis"] = basis_file(tmp_path / "first.safetensors", 1)
        second["basis"] = basis_file(tmp_path / "second.safetensors", 2)
    elif change == "block size":
        options["block_size"] = 128
    elif change == "skipped":
        second["skip_layers"] = [1]
    else:
        options["dtype"] = "bfloat16"
    folder = stored.folder
    if change == "basis":
        folder = Stored(model, tmp_path / "files", settings=first).folder
    with offloading(model, folder, second, **options) as llm:
        (answer,) = ask(llm, [prompt()])
    with engine(
        second,
        model=str(model),
        skip_tokenizer_init=True,
        **{"dtype": "float32", "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 26} | options,
    ) as llm:
        (cold,) = generate(llm, [prompt()], 4, logprobs=20)
    assert answer.num_cached_tokens == 0
    assert_same(answer, cold)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)


def fill(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [truncate, empty, lengthen, flip_a_bit, fill, make_a_folder], ids=lambda f: f.__name__
)
def test_damaged_files_are_computed_again(
    model: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    stored = Stored(model, tmp_path)
    for path in stored.files:
        damage(path)
    with offloading(model, tmp_path) as llm:
        answer, hit = (ask(llm, [prompt()])[0] for _ in range(2))
    if damage is lengthen:  # all that was written is there
        assert answer.num_cached_tokens == CACHED
        assert_same(answer, stored.hit)
    else:
        assert answer.num_cached_tokens == 0
        assert_same(answer, stored.cold)
    assert_same(hit, stored.hit)
    if damage is make_a_folder:
        return
    with offloading(model, tmp_path) as llm:
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED, "the files were written again"
    assert_same(restored, stored.hit)


def test_files_of_other_prompts_are_not_read(model: Path, tmp_path: Path) -> None:
    """A file that lies under another's name is damaged as well."""
    stored = Stored(model, tmp_path)
    contents = [path.read_bytes() for path in stored.files]
    for path, content in zip(stored.files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    with offloading(model, tmp_path) as llm:
        (answer,) = ask(llm, [prompt()])
    assert answer.num_cached_tokens == 0
    assert_same(answer, stored.cold)


def test_requests_that_share_a_prefix_restore_it_together(model: Path, stored: Stored) -> None:
    tails = [prompt(seed, 20 * seed) for seed in range(1, 7)]
    prompts = [[*prompt()[:CACHED], *tail] for tail in tails]
    with engine(
        SETTINGS,
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 26,
    ) as llm:
        generate(llm, [prompt()], 1)
        expected = [generate(llm, [tokens], 4, logprobs=20)[0] for tokens in prompts]
    with offloading(model, stored.folder) as llm:
        answers = ask(llm, prompts)
    for answer, hit in zip(answers, expected, strict=True):
        assert answer.num_cached_tokens == hit.num_cached_tokens == CACHED
        assert_same(answer, hit)


def test_chunks_of_several_blocks(model: Path, tmp_path: Path) -> None:
    extra = {"blocks_per_chunk": 3}
    stored = Stored(model, tmp_path, extra=extra)
    assert len(stored.files) == 1
    with offloading(model, tmp_path, extra=extra) as llm:
        (restored,) = ask(llm, [prompt()])
        assert restored.num_cached_tokens == 192
        assert llm.reset_prefix_cache()
        ask(llm, [prompt()[:100]])  # leaves the first block in the cache, not the rest of the chunk
        (joined,) = ask(llm, [prompt()])
    assert joined.num_cached_tokens == 192
    assert_same(joined, restored, 1e-4)


def test_preempted_requests_come_back_from_host_memory(model: Path) -> None:
    """A crowd that outgrows the cache, twice: the second time it is restored."""
    crowd = [prompt(seed, 190) for seed in range(12)]
    with offloading(model, num_gpu_blocks_override=24) as llm:
        alone = [texts(ask(llm, [tokens]))[0] for tokens in crowd]
        assert llm.reset_prefix_cache()
        for _ in range(2):
            outputs = ask(llm, crowd)
            assert [output.num_cached_tokens for output in outputs] == [128] * len(crowd)
            assert texts(outputs) == alone
