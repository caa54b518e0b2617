"""Two ranks answer as one process does; prefixes survive those that computed them, killed while
they store, and serve others that live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
from engines import generate
from peers import Peer, assert_same, described, peer
from test_engine_transfer import (
    CACHED,
    SETTINGS,
    ask,
    offloading,
    offloading_options,
    plain,
    prompt,
)

pytestmark = pytest.mark.usefixtures("engines_in_process")


@contextmanager
def answers(model: Path, folder: Path, files: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Of a prompt asked twice, by two ranks that are killed once ``folder`` has so many files."""
    options = offloading_options(model, folder, tensor_parallel_size=2)
    with peer(folder.parent / "log.txt", options) as ranks:
        found = [ranks.ask(prompt()) for _ in range(2)]
        wait_for_files(folder, files, ranks)
        yield found


def wait_for_files(folder: Path, count: int, writer: Peer) -> None:
    """As long as a machine may take, while the engine that writes them lives."""
    deadline = time.monotonic() + 600
    while len(list(folder.rglob("*.bin"))) < count:
        assert writer.process.is_alive(), "the engine ended before its pages were written"
        assert time.monotonic() < deadline, "pages were not written"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


def test_two_ranks_that_were_killed(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with answers(model, folder, CACHED // 64) as (cold, hit):
        pass
    assert (cold["cached"], hit["cached"]) == (0, CACHED)
    with answers(model, folder) as (restored, _):
        pass
    assert restored["cached"] == CACHED
    assert_same(restored, hit)
    with offloading(model, folder) as llm:
        one = described(ask(llm, [prompt()])[0])
    assert one["cached"] == 0, "one rank does not read halves"
    assert_same(cold, one)
    assert cold["text"] == one["text"]


def test_two_engines_that_live_share_a_folder(model: Path, tmp_path: Path) -> None:
    """One here, one elsewhere; then one here with other settings, of pages of the same size."""
    folder, blocks = tmp_path / "files", CACHED // 64
    folder.mkdir()
    with peer(tmp_path / "log.txt", offloading_options(model, folder)) as other:
        with offloading(model, folder) as llm:
            cold, hit = (described(ask(llm, [prompt()])[0]) for _ in range(2))
            wait_for_files(folder, blocks, other)
            read = other.ask(prompt())
            assert (cold["cached"], hit["cached"], read["cached"]) == (0, CACHED, CACHED)
            assert_same(read, hit)

            cold, hit = (other.ask(prompt(1)) for _ in range(2))
            wait_for_files(folder, 2 * blocks, other)
            read = described(ask(llm, [prompt(1)])[0])
            assert (cold["cached"], hit["cached"], read["cached"]) == (0, CACHED, CACHED)
            assert_same(read, hit)

            other.tell(prompt(2))  # both write it
            ask(llm, [prompt(2)])
            other.answer()
            wait_for_files(folder, 3 * blocks, other)
            both = [described(ask(llm, [prompt(2)])[0]), other.ask(prompt(2))]
            assert [answer["cached"] for answer in both] == [CACHED] * 2
            assert_same(*both)
            assert len(list(folder.rglob("*.bin"))) == 3 * blocks
        settings = SETTINGS | {"key_dtype": "int3", "value_dtype": "int4"}
        with offloading(model, folder, settings) as llm:
            answers = [
                described(output) for seed in range(3) for output in ask(llm, [prompt(seed)])
            ]
        with plain(model, settings) as llm:
            expected = [
                described(generate(llm, [prompt(seed)], 4, logprobs=20)[0]) for seed in range(3)
            ]
        assert [answer["cached"] for answer in answers] == [0, 0, 0]
        for answer, cold in zip(answers, expected, strict=True):
            assert_same(answer, cold)
        assert other.ask(prompt(), fresh=True)["cached"] == CACHED
