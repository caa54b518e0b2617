"""Pages in the memory of LMCache's server, where engines find them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import models
import pytest
from engines import first_logprobs, generate
from server import free_port
from test_engine_transfer import CACHED, SETTINGS, ask, assert_same, plain, prompt
from vllm import LLM

pytestmark = [
    pytest.mark.skipif(not find_spec("lmcache"), reason="needs lmcache, pip install lmcache"),
    pytest.mark.usefixtures("engines_in_process", "hidden_from_vllm"),
]

CHUNK = 128
"""Tokens that the server keeps as one."""


@pytest.fixture(scope="module")
def hidden_from_vllm() -> Iterator[None]:
    """vLLM looks for kernels in every module and stumbles over llvmlite, which LMCache imports.

    Engines in processes of their own start before anything is imported there.
    """
    with pytest.MonkeyPatch.context() as patch:
        import llvmlite.binding.ffi

        patch.delitem(sys.modules, llvmlite.binding.ffi.__name__)
        yield


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server with an empty memory."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--supported-transfer-mode", "engine_driven"]
    command += ["--chunk-size", str(CHUNK), "--l1-size-gb", "0.1", "--eviction-policy", "LRU"]
    command += ["--max-workers", "1", "--disable-observability"]
    environment = os.environ | {"LMCACHE_TRACK_USAGE": "false"}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            while not answers(port):
                assert process.poll() is None, log.read_text()[-4000:]
                time.sleep(0.1)
            yield port
        finally:
            process.kill()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


def served(model: Path, port: int, **changes: Any) -> AbstractContextManager[LLM]:
    connector = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": port,
            "lmcache.mp.mq_timeout": 60,
        },
    }
    options = {"settings": SETTINGS, "kv_transfer_config": connector} | changes
    return plain(model, **options)


@pytest.fixture(scope="module")
def hit(model: Path, port: int) -> Any:
    """The answer to a prompt that the server keeps, with it in the engine's own cache."""
    with served(model, port) as llm:
        cold, hit = (ask(llm, [prompt()])[0] for _ in range(2))
        assert (cold.num_cached_tokens, hit.num_cached_tokens) == (0, CACHED)
        assert llm.reset_prefix_cache()
        (restored,) = ask(llm, [prompt()])
        assert restored.num_cached_tokens == CACHED
        assert_same(restored, hit)
    return hit


def test_another_engine_finds_the_pages(model: Path, port: int, hit: Any) -> None:
    """Whatever its window; no window holds them, so the first token does not depend on it."""
    with served(model, port, settings=SETTINGS | {"window": 8}) as llm:
        (restored,) = ask(llm, [prompt()])
    assert restored.num_cached_tokens == CACHED
    restored, hit = first_logprobs(restored), first_logprobs(hit)
    assert max(abs(restored[token] - hit[token]) for token in hit) <= 1e-5


def test_pages_of_other_settings_are_not_found(model: Path, port: int, hit: Any) -> None:
    """Those of these settings have the same size."""
    settings = SETTINGS | {"key_dtype": "int3", "value_dtype": "int4"}
    with served(model, port, settings=settings) as llm:
        (answer,) = ask(llm, [prompt()])
    with plain(model, settings) as llm:
        (cold,) = generate(llm, [prompt()], 4, logprobs=20)
    assert answer.num_cached_tokens == 0
    assert_same(answer, cold)


def test_pages_of_another_block_size_are_not_found(model: Path, port: int, hit: Any) -> None:
    with served(model, port, block_size=CHUNK) as llm:
        answers = [ask(llm, [prompt()])[0] for _ in range(2)]
    assert [answer.num_cached_tokens for answer in answers] == [0, CACHED]
