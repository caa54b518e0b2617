"""An engine computes a prompt's pages, another reads them over NIXL and decodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
from programs import program
from test_engine_transfer import SETTINGS, prompt
from vllm.distributed.nixl_utils import is_nixl_available
from vllm.utils.network_utils import get_open_port

pytestmark = pytest.mark.skipif(not is_nixl_available(), reason="needs nixl, pip install nixl")

LENGTH = 257
"""Tokens of a prompt: four blocks and the one that every engine computes."""

CODE = """
import json, select, sys
from engines import engine, first_logprobs, generate, metric, texts

def next_line(core):
    # Steps go on meanwhile, as in a server: they write pages.
    while not select.select([sys.stdin], [], [], 0.05)[0]:
        if core.scheduler.has_requests():
            core.step_fn()
    return sys.stdin.readline()

with engine(skip_tokenizer_init=True, **json.loads(sys.argv[1])) as llm:
    print("READY", flush=True)
    while line := next_line(llm.llm_engine.engine_core.engine_core):
        prompt, params, fresh = json.loads(line)
        assert not fresh or llm.reset_prefix_cache()
        extra = {"extra_args": {"kv_transfer_params": params}} if params else {}
        (output,) = generate(llm, [prompt], 4, logprobs=20, **extra)
        answer = {
            "cached": output.num_cached_tokens,
            "logprobs": first_logprobs(output),
            "text": texts([output])[0],
            "params": output.kv_transfer_params,
        }
        print("ANSWER", json.dumps(answer), flush=True)
"""


class Engine:
    """One in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._read("READY")

    def ask(
        self, prompt: list[int], params: dict[str, Any] | None = None, fresh: bool = False
    ) -> dict[str, Any]:
        """Once everything cached is forgotten, if ``fresh``."""
        print(json.dumps([prompt, params, fresh]), file=self._process.stdin, flush=True)
        return json.loads(self._read("ANSWER"))

    def _read(self, word: str) -> str:
        for line in self._process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise AssertionError(self._log.read_text()[-4000:])


@contextmanager
def start(
    model: Path, role: str, log: Path, settings: dict[str, Any], connector: str = "NixlConnector"
) -> Iterator[Engine]:
    options = {
        "settings": settings,
        "model": str(model),
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": 64,
        "kv_cache_memory_bytes": 1 << 24,
        "kv_transfer_config": {
            "kv_connector": connector,
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
        },
    }
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(get_open_port()),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "TORCHDYNAMO_DISABLE": "1",
    }
    with program(CODE, json.dumps(options), log, **environment) as process:
        yield Engine(process, log)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prefill(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    log = tmp_path_factory.mktemp("prefill") / "log.txt"
    with start(model, "kv_producer", log, SETTINGS) as engine:
        yield engine


def computed(prefill: Engine, tokens: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the first engine says with the prompt in its cache, and where its pages are."""
    params = prefill.ask(tokens, {"do_remote_decode": True, "do_remote_prefill": False})["params"]
    assert params["do_remote_prefill"] and len(params["remote_block_ids"]) == 1, "pages, no window"
    return prefill.ask(tokens), params


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["logprobs"].keys() == expected["logprobs"].keys()
    for token, logprob in expected["logprobs"].items():
        assert abs(actual["logprobs"][token] - logprob) <= 1e-5


def test_pages_are_read_from_the_engine_that_computed_them(
    model: Path, prefill: Engine, tmp_path: Path
) -> None:
    with start(model, "kv_consumer", tmp_path / "log.txt", SETTINGS | {"window": 8}) as decode:
        for seed in range(2):
            hit, params = computed(prefill, prompt(seed, LENGTH))
            read, again = decode.ask(prompt(seed, LENGTH), params), decode.ask(prompt(seed, LENGTH))
            assert hit["cached"] == again["cached"] == 256
            assert read["cached"] >= 256
            for answer in (read, again):
                assert_same(answer, hit)


def test_pages_are_written_by_the_engine_that_computed_them(model: Path, tmp_path: Path) -> None:
    """Before it is asked for anything else."""
    tokens, push = prompt(0, LENGTH), "NixlPushConnector"
    with (
        start(model, "kv_producer", tmp_path / "prefill.txt", SETTINGS, push) as prefill,
        start(model, "kv_consumer", tmp_path / "decode.txt", SETTINGS, push) as decode,
    ):
        params = prefill.ask(tokens, {"do_remote_decode": True})["params"]
        written, again = decode.ask(tokens, params), decode.ask(tokens)
        hit = prefill.ask(tokens)
    assert hit["cached"] == again["cached"] == 256
    assert written["cached"] >= 256
    for answer in (written, again):
        assert_same(answer, hit)


def test_pages_of_other_settings_are_refused_and_computed(
    model: Path, prefill: Engine, tmp_path: Path
) -> None:
    """Those of these settings have the same size."""
    settings = SETTINGS | {"key_dtype": "int3", "value_dtype": "int4"}
    with start(model, "kv_consumer", tmp_path / "log.txt", settings) as decode:
        _, params = computed(prefill, prompt(2, LENGTH))
        answer, hit = decode.ask(prompt(2, LENGTH), params), decode.ask(prompt(2, LENGTH))
        cold = decode.ask(prompt(2, LENGTH), fresh=True)
    assert "NIXL compatibility hash mismatch" in (tmp_path / "log.txt").read_text()
    assert (answer["cached"], hit["cached"], cold["cached"]) == (0, 256, 0)
    assert_same(answer, cold)
