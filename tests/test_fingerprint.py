"""Pages are interchangeable exactly if their fingerprints are equal."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from vllm_sparsekv.format.codecs import CODECS
from vllm_sparsekv.format.fingerprint import PAGE_VERSION, fingerprint, origin
from vllm_sparsekv.format.layout import SparseFormat
from vllm_sparsekv.kernels.pack.reference import pack
from vllm_sparsekv.settings import SparseKVConfig

SETTINGS = SparseKVConfig(basis="/bases/a", basis_sha256="aa")
MODEL: dict[str, Any] = {
    "model": "some/model",
    "revision": None,
    "weights": ["w0", "w1"],
    "configuration": {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4, "factor": 2}},
    "dtype": "torch.bfloat16",
}


def of(settings: SparseKVConfig = SETTINGS, block_size: int = 64, **model: Any) -> str:
    return fingerprint(origin(settings, **MODEL | model), block_size)


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 128},
        {"settings": replace(SETTINGS, key_dtype="int3")},
        {"settings": replace(SETTINGS, value_dtype="int4")},
        {"settings": replace(SETTINGS, key_sparsity=0.5)},
        {"settings": replace(SETTINGS, value_sparsity=0.5, value_dtype="int4")},
        {"settings": replace(SETTINGS, skip_layers=(0,))},
        {"settings": replace(SETTINGS, basis_sha256="bb")},
        {"settings": replace(SETTINGS, basis="none")},
        {"model": "some/other"},
        {"revision": "main"},
        {"weights": ["w0"]},
        {"configuration": {"hidden_size": 64, "rope_parameters": {"rope_theta": 1e4}}},
        {"dtype": "torch.float16"},
        {"drafter": MODEL},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_ingredient_changes_it(change):
    assert of(**change) != of()


@pytest.mark.parametrize(
    "change",
    [
        {"window": 0},
        {"calibration_tokens": 2048},
        {"basis": "/bases/copy of a"},
    ],
)
def test_what_shapes_no_page_does_not(change):
    assert of(replace(SETTINGS, **change)) == of()


def test_a_basis_that_no_codec_takes_does_not():
    """``basis="none"`` keeps no hash of a basis it does not use."""
    none = replace(SETTINGS, basis="none")
    assert of(none) == of(replace(none, basis_sha256=None))


def test_order_of_keys_does_not():
    shuffled = {"rope_parameters": {"factor": 2, "rope_theta": 1e4}, "hidden_size": 64}
    assert of(configuration=shuffled) == of()


def test_the_version_changes_it(monkeypatch):
    before = of()
    monkeypatch.setattr("vllm_sparsekv.format.fingerprint.PAGE_VERSION", PAGE_VERSION + 1)
    assert of() != before


PAGES = {
    "auto": "3897e9866ca3c218",
    "fp8": "c2710abfe79b2699",
    "int2": "0d2c713d8098db31",
    "int3": "9a52452032686174",
    "int4": "2f5b87a6da71e2f4",
    "int4_int2": "e3fabffbbbb2f7cc",
}
"""By codec of the keys, with int4 values: sha256 of the page of :func:`page`, first 16 digits."""


def page(codec: str) -> bytes:
    """16 tokens, two heads of 32 elements, pruned where the codec can be."""
    sparsity = 0.0 if CODECS[codec].whole_only else 0.5
    settings = SparseKVConfig(
        key_dtype=codec, value_dtype="int4", key_sparsity=sparsity, basis="/a"
    )
    fmt = SparseFormat.from_config(settings, 32, torch.float32, 0)
    vectors = torch.arange(2 * 16 * 2 * 32).mul(37).remainder(101).sub(50).div(16)
    key, value = vectors.view(2, 16, 2, 32)
    pages = torch.zeros(1, 2, 16, fmt.token_bytes, dtype=torch.uint8)
    pack(key, value, torch.arange(16), pages, fmt)
    return pages.numpy().tobytes()


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_pages_are_as_their_version_says(codec):
    """Where this fails the bytes of pages have changed: raise ``PAGE_VERSION``."""
    assert PAGE_VERSION == 2
    assert hashlib.sha256(page(codec)).hexdigest()[:16] == PAGES[codec]
