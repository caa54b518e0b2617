"""Two ranks answer as one process does, and prefixes survive the ranks that computed them.

They are killed while they store.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import models
import pytest
from engines import first_logprobs, texts
from programs import program
from test_engine_transfer import CACHED, SETTINGS, ask, offloading, prompt

pytestmark = pytest.mark.usefixtures("engines_in_process")

CODE = """
import json, sys
from engines import engine, first_logprobs, generate, texts

options, prompt = json.loads(sys.argv[1])
with engine(skip_tokenizer_init=True, **options) as llm:
    for _ in range(2):
        outputs = generate(llm, [prompt], 4, logprobs=20)
        answer = outputs[0].num_cached_tokens, first_logprobs(outputs[0]), texts(outputs)[0]
        print("ANSWER", json.dumps(answer), flush=True)
    sys.stdin.read()
"""

SEPARATE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


class Answer(NamedTuple):
    cached: int
    logprobs: dict[str, float]
    text: list[int]


@contextmanager
def answers(model: Path, folder: Path, files: int = 0) -> Iterator[list[Answer]]:
    """Of a prompt asked twice, by two ranks that are killed once ``folder`` has so many files."""
    tier = {"type": "fs", "root_dir": str(folder), "n_read_threads": 1, "n_write_threads": 1}
    options: dict[str, Any] = {
        "settings": SETTINGS,
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": 64,
        "kv_cache_memory_bytes": 1 << 26,
        "tensor_parallel_size": 2,
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 24, "secondary_tiers": [tier]},
        },
    }
    log = folder.parent / "log.txt"
    with program(CODE, json.dumps([options, prompt()]), log, **SEPARATE) as process:
        lines = (line for line in process.stdout if line.startswith("ANSWER"))
        found = [Answer(*json.loads(line[len("ANSWER") :])) for line in islice(lines, 2)]
        assert len(found) == 2, log.read_text()[-4000:]
        wait_for_files(folder, files, process)
        yield found


def wait_for_files(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """As long as a machine may take, while the process that writes them lives."""
    deadline = time.monotonic() + 600
    while len(list(folder.rglob("*.bin"))) < count:
        assert process.poll() is None, "the engine ended before its pages were written"
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
    assert (cold.cached, hit.cached) == (0, CACHED)
    with answers(model, folder) as (restored, _):
        pass
    assert restored.cached == CACHED
    assert_same(restored, hit)
    with offloading(model, folder) as llm:
        (other,) = ask(llm, [prompt()])
    assert other.num_cached_tokens == 0, "one rank does not read halves"
    logprobs = {str(token): logprob for token, logprob in first_logprobs(other).items()}
    assert_same(cold, Answer(0, logprobs, texts([other])[0]))


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.text == expected.text
    assert found.logprobs.keys() == expected.logprobs.keys()
    for token, logprob in expected.logprobs.items():
        assert abs(found.logprobs[token] - logprob) <= 1e-5
