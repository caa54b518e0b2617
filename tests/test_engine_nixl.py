"""An engine computes a prompt's pages, another reads them over NIXL and decodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import models
import pytest
from engines import generate
from peers import Peer, assert_same, described, peer
from test_engine_transfer import PAGES, SETTINGS, offloading_options, plain, plain_options, prompt
from vllm.distributed.nixl_utils import is_nixl_available
from vllm.utils.network_utils import get_open_port

pytestmark = [
    pytest.mark.skipif(not is_nixl_available(), reason="needs nixl, pip install nixl"),
    pytest.mark.usefixtures("engines_in_process"),
]

LENGTH = 257
"""Tokens of a prompt: four blocks and the one that every engine computes."""


MEMORY = 1 << 24
"""Bytes of a cache."""


def start(
    model: Path,
    role: str,
    log: Path,
    settings: dict[str, Any],
    connector: str = "NixlConnector",
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> AbstractContextManager[Peer]:
    """``extra`` is the connector's own configuration."""
    transfer = {
        "kv_connector": connector,
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra or {},
    }
    given = plain_options(
        model, settings, kv_transfer_config=transfer, kv_cache_memory_bytes=MEMORY, **options
    )
    return peer(log, given, VLLM_NIXL_SIDE_CHANNEL_PORT=str(get_open_port()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prefill(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    log = tmp_path_factory.mktemp("prefill") / "log.txt"
    with start(model, "kv_producer", log, SETTINGS) as engine:
        yield engine


def pages_of(prefill: Peer, tokens: list[int], groups: int = 1, cached: int = 0) -> dict[str, Any]:
    """Where the first engine has a prompt's pages; asked for one token, as proxies do."""
    params = prefill.ask(tokens, params={"do_remote_decode": True}, max_tokens=1)["params"]
    assert params["do_remote_prefill"] and len(params["remote_block_ids"]) == groups
    # vLLM has the second engine say this for its own: what was cached in the first.
    assert params.pop("remote_prefill_cached_tokens") == cached
    return params


def test_pages_are_read_from_the_engine_that_computed_them(
    model: Path, prefill: Peer, tmp_path: Path
) -> None:
    with start(model, "kv_consumer", tmp_path / "log.txt", SETTINGS | {"window": 8}) as decode:
        for seed in range(2):
            params = pages_of(prefill, prompt(seed, LENGTH))
            hit = prefill.ask(prompt(seed, LENGTH))
            read = decode.ask(prompt(seed, LENGTH), params=params)
            again = decode.ask(prompt(seed, LENGTH))
            assert hit["cached"] == again["cached"] == 256
            assert read["cached"] == LENGTH
            assert read["moved"] == again["moved"] == (seed + 1) * 5 * PAGES
            for answer in (read, again):
                assert_same(answer, hit)
        other = pages_of(prefill, prompt(2, LENGTH)) | {"remote_prefill_cached_tokens": 0}
        read = decode.ask(prompt(2, LENGTH), params=other)
        assert (read["cached"], read["moved"]) == (0, 3 * 5 * PAGES), "what the first engine says"


def test_pages_are_written_by_the_engine_that_computed_them(model: Path, tmp_path: Path) -> None:
    """Before it is asked for anything else."""
    tokens, push = prompt(0, LENGTH), "NixlPushConnector"
    with (
        start(model, "kv_producer", tmp_path / "prefill.txt", SETTINGS, push) as prefill,
        start(model, "kv_consumer", tmp_path / "decode.txt", SETTINGS, push) as decode,
    ):
        params = pages_of(prefill, tokens)
        written, again = decode.ask(tokens, params=params), decode.ask(tokens)
        hit = prefill.ask(tokens)
    assert hit["cached"] == again["cached"] == 256
    assert written["cached"] == LENGTH
    for answer in (written, again):
        assert_same(answer, hit)


@pytest.mark.parametrize(
    ("connector", "cached", "step", "error"),
    [
        ("NixlConnector", 256, 23, 1e-5),
        # Here the last token's slot was another's that the engine that computes all still has.
        # Nothing is cached, as vLLM's engines do not send what they had before they were asked.
        ("NixlPushConnector", 0, 31, 0.05),
    ],
)
def test_a_window_that_is_moved(
    model: Path, tmp_path: Path, connector: str, cached: int, step: int, error: float
) -> None:
    """Then the first token is that of an engine that computes the prompt's last one by itself."""
    settings = SETTINGS | {"value_dtype": "int2"}
    tokens, small = prompt(4, 256 + 24), {"max_num_batched_tokens": step}
    given = {"settings": settings, "connector": connector, "extra": {"move_window": True}}
    with (
        start(model, "kv_producer", tmp_path / "one", **given, **small) as prefill,
        start(model, "kv_consumer", tmp_path / "two", **given) as decode,
    ):
        if cached:
            prefill.ask(tokens[: cached + 1])
        params = pages_of(prefill, tokens, groups=2, cached=cached)
        read = decode.ask(tokens, params=params)
    computed, without = (
        alone(model, settings | change, tokens, cached, **small) for change in ({}, {"window": 0})
    )
    assert (read["cached"], computed["cached"]) == (280, cached)
    assert difference(read, computed) <= error
    assert difference(read, without) > max(1e-2, 2 * error)


def alone(
    model: Path, settings: dict[str, Any], tokens: list[int], cached: int, **options: Any
) -> dict[str, Any]:
    """The answer of an engine without a connector that had the first tokens before."""
    with plain(model, settings, **options) as llm:
        if cached:
            generate(llm, [tokens[: cached + 1]], 1)
        return described(generate(llm, [tokens], 4, logprobs=20)[0])


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest in the log-probabilities of candidates of either answer for the first token."""
    tokens = one["logprobs"].keys() | other["logprobs"].keys()
    lowest = [min(answer["logprobs"].values()) for answer in (one, other)]
    found = [
        [answer["logprobs"].get(token, least) for token in tokens]
        for answer, least in zip((one, other), lowest, strict=True)
    ]
    return max(abs(a - b) for a, b in zip(*found, strict=True))


def test_pages_of_other_settings_are_refused_and_computed(
    model: Path, prefill: Peer, tmp_path: Path
) -> None:
    """Those of these settings have the same size."""
    settings = SETTINGS | {"key_dtype": "int3", "value_dtype": "int4"}
    with start(model, "kv_consumer", tmp_path / "log.txt", settings) as decode:
        params = pages_of(prefill, prompt(3, LENGTH))
        answer, hit = decode.ask(prompt(3, LENGTH), params=params), decode.ask(prompt(3, LENGTH))
        cold = decode.ask(prompt(3, LENGTH), fresh=True)
    assert "NIXL compatibility hash mismatch" in (tmp_path / "log.txt").read_text()
    assert (answer["cached"], hit["cached"], cold["cached"]) == (0, 256, 0)
    assert (answer["moved"], cold["moved"]) == (0, 0)
    assert_same(answer, cold)


def beside(
    model: Path, port: int, log: Path, settings: dict[str, Any] = SETTINGS
) -> AbstractContextManager[Peer]:
    """An engine whose host memory others read, and that reads theirs."""
    tier = {"type": "p2p", "host": "127.0.0.1", "port": port}
    extra = {"secondary_tiers": [tier]}
    given = offloading_options(model, settings=settings, extra=extra, kv_cache_memory_bytes=MEMORY)
    return peer(log, given)


def test_pages_in_the_host_memory_of_a_peer(model: Path, tmp_path: Path) -> None:
    port, tokens = get_open_port(), prompt(0, LENGTH)

    def of_one(name: str) -> dict[str, Any]:
        """Requests have names of their own."""
        source = {"kv_request_id": name, "remote_host": "127.0.0.1", "remote_port": port}
        return {"remote_kv_source": source}

    with beside(model, port, tmp_path / "one.txt") as one:
        cold, hit = one.ask(tokens), one.ask(tokens)
        with beside(model, get_open_port(), tmp_path / "other.txt") as other:
            read, again = other.ask(tokens, params=of_one("read")), other.ask(tokens)
        settings = SETTINGS | {"key_dtype": "int3", "value_dtype": "int4"}
        with beside(model, get_open_port(), tmp_path / "third.txt", settings) as third:
            refused = third.ask(tokens, params=of_one("refused"))
    with plain(model, settings) as llm:
        expected = described(generate(llm, [tokens], 4, logprobs=20)[0])
    assert [answer["cached"] for answer in (cold, hit, read, again)] == [0, 256, 256, 256]
    for answer in (read, again):
        assert_same(answer, hit)
    assert refused["cached"] == 0
    assert_same(refused, expected)
