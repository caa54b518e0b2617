"""``--kv-cache-dtype`` alone selects sparse pages and their preset."""

from __future__ import annotations

from typing import Any

import pytest
import vllm
from engines import MODEL
from packaging.version import Version
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_sparsekv.engine.admission import settings_of
from vllm_sparsekv.engine.plugin import backend_member
from vllm_sparsekv.settings import CACHE_DTYPES, PRESETS, SparseKVConfig

WITHOUT_BASIS = {"sparsekv": {"basis": "none"}}
NEXT = Version(vllm.__version__) >= Version("0.33")


def arguments(name: str, **options: Any) -> EngineArgs:
    options = {"additional_config": WITHOUT_BASIS, "max_model_len": 1024} | options
    return EngineArgs(model=str(MODEL), skip_tokenizer_init=True, kv_cache_dtype=name, **options)


def configure(name: str, **options: Any) -> Any:
    return arguments(name, **options).create_engine_config()


def test_every_preset_has_a_name() -> None:
    assert CACHE_DTYPES == {
        "sparsekv": None,
        "sparsekv_quality": "quality",
        "sparsekv_balanced": "balanced",
        "sparsekv_capacity": "capacity",
        "sparsekv_safe": "safe",
        "sparsekv_sparse50": "sparse-50",
        "sparsekv_sparse70": "sparse-70",
    }
    assert sorted(PRESETS) == sorted(filter(None, CACHE_DTYPES.values()))


@pytest.mark.parametrize("name", CACHE_DTYPES)
def test_a_name_selects_backend_and_preset(name: str) -> None:
    config = configure(name)
    assert config.attention_config.backend.name == "SPARSEKV"
    assert config.cache_config.cache_dtype == "auto"
    given = {"preset": CACHE_DTYPES[name], "basis": "none"}
    assert settings_of(config) == SparseKVConfig.from_dict(given)


def test_a_name_alone_is_what_the_settings_say() -> None:
    """Without any other argument; the preset has no integers, so nothing is calibrated."""
    config = configure("sparsekv_sparse50", additional_config={})
    assert config.additional_config == {"sparsekv": {"preset": "sparse-50"}}
    assert settings_of(config).key_sparsity == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": "sparsekv"},
        {"attention_backend": "auto"},
        {"attention_config": AttentionConfig(backend=backend_member())},
        {
            "additional_config": {
                "sparsekv": {"preset": "safe", "window": 32, "basis": "none"},
                "other": 1,
            }
        },
    ],
    ids=str,
)
def test_arguments_that_say_the_same_stay(options: dict[str, Any]) -> None:
    before = str(options)
    args = arguments("sparsekv_safe", **options)
    for config in (args.create_engine_config(), args.create_engine_config()):
        assert config.attention_config.backend.name == "SPARSEKV"
        settings = settings_of(config)
        assert settings.key_sparsity == 0.5
        assert settings.window == (32 if "additional_config" in options else 64)
        assert config.additional_config.get("other") == options.get("additional_config", {}).get(
            "other"
        )
    assert str(options) == before


def test_the_default_s_name_leaves_the_preset_open() -> None:
    config = configure("sparsekv", additional_config={"sparsekv": {"preset": "sparse-70"}})
    assert settings_of(config).key_sparsity == 0.7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "sparsekv_qualty",
            {},
            r"kv_cache_dtype='sparsekv_qualty': must be one of \['sparsekv', 'sparsekv_balanced',",
        ),
        (
            "sparsekv_quality",
            {"additional_config": {"sparsekv": {"preset": "capacity"}}},
            r"kv_cache_dtype='sparsekv_quality': is preset 'quality', but "
            r"sparsekv\.preset='capacity'",
        ),
        (
            "sparsekv_quality",
            {"attention_backend": "CPU_ATTN"},
            r"kv_cache_dtype='sparsekv_quality': needs attention_backend=sparsekv, but it is "
            r"CPU_ATTN",
        ),
        (
            "sparsekv",
            {"attention_config": AttentionConfig(backend="CPU_ATTN")},
            r"kv_cache_dtype='sparsekv': needs attention_backend=sparsekv, but it is CPU_ATTN",
        ),
        ("sparsekv", {"additional_config": [1]}, r"additional_config=\[1\] must be a mapping"),
        (
            "sparsekv_safe",
            {"additional_config": {"sparsekv": ["preset"]}},
            r"additional_config=\{'sparsekv': \['preset'\]\} must be a mapping, and so must its",
        ),
    ],
)
def test_contradictions_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(name, **options)


def test_command_line(capsys: Any) -> None:
    """vLLM 0.32 refuses the name while it reads the command line, before it loads plugins."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    line = ["--model", str(MODEL), "--kv-cache-dtype", "sparsekv_sparse50"]
    if NEXT:
        config = EngineArgs.from_cli_args(parser.parse_args(line)).create_engine_config()
        assert config.attention_config.backend.name == "SPARSEKV"
        assert settings_of(config).value_sparsity == 0.5
    else:
        with pytest.raises(SystemExit):
            parser.parse_args(line)
        assert "invalid choice: 'sparsekv_sparse50'" in capsys.readouterr().err
