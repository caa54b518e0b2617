"""What users may write under ``sparsekv`` and what they are told when it is wrong."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_sparsekv.settings import PRESETS, SparseKVConfig

SPARSITY = "must be a number s with 0 <= s < 1"
DTYPES = {
    "key_dtype": ["auto", "fp8", "int2", "int3", "int4", "int4_int2"],
    "value_dtype": ["auto", "fp8", "int2", "int3", "int4"],
}
WINDOW = "must be an integer >= 0 (tokens)"
SETTINGS = (
    "['preset', 'key_sparsity', 'value_sparsity', 'key_dtype', 'value_dtype', 'window', "
    "'window_dtype', 'basis', 'calibration_tokens', 'basis_sha256', 'skip_layers']"
)


def test_defaults():
    defaults = SparseKVConfig()
    assert SparseKVConfig.from_dict(None) == SparseKVConfig.from_dict({}) == defaults
    assert SparseKVConfig.from_dict({"preset": "balanced"}) == defaults
    assert (defaults.window, defaults.window_dtype) == (112, "int8") and defaults.basis == "auto"


def test_without_a_basis_the_default_is_what_no_model_suffers_from():
    config = SparseKVConfig.from_dict({"basis": "none", "window": 8})
    assert config == SparseKVConfig(**PRESETS["safe"] | {"window": 8}, basis="none")
    assert config.vectors == "keys fp8 pruned by 50%, values int4"
    named = SparseKVConfig.from_dict({"basis": "none", "preset": "balanced"})
    assert named.vectors == "keys int4, values int3"
    small = SparseKVConfig.from_dict({"basis": "none", "preset": "capacity"})
    assert small.vectors == "keys int3, values int3"
    assert SparseKVConfig.from_dict({"preset": "capacity"}).key_dtype == "int4_int2"
    keys = SparseKVConfig.from_dict({"basis": "none", "key_dtype": "int4"})
    assert keys.vectors == "keys int4, values int4"


def test_pruning_needs_no_codec_named():
    assert SparseKVConfig.from_dict({"value_sparsity": 0.5}).vectors == (
        "keys int4, values fp8 pruned by 50%"
    )
    assert SparseKVConfig.from_dict({"key_sparsity": 0.3}).vectors == (
        "keys fp8 pruned by 30%, values int3"
    )
    both = {"key_sparsity": 0.7, "value_sparsity": 0.7}
    assert SparseKVConfig.from_dict(both) == SparseKVConfig(**PRESETS["sparse-70"])
    # A preset's codec stays where it can be pruned.
    on_top = SparseKVConfig.from_dict(both | {"preset": "balanced"})
    assert (on_top.key_dtype, on_top.value_dtype) == ("int4", "fp8")
    paper = both | {"key_dtype": "auto", "value_dtype": "auto", "window": 32}
    assert SparseKVConfig.from_dict(paper) == SparseKVConfig(0.7, 0.7, "auto", "auto", 32, "auto")


def test_what_takes_a_basis():
    assert SparseKVConfig.from_dict({"preset": "capacity"}).takes_basis
    assert not SparseKVConfig.from_dict({"preset": "sparse-50"}).takes_basis
    assert SparseKVConfig(basis="b").basis_path == "b"
    assert SparseKVConfig().basis_path is SparseKVConfig(basis="none").basis_path is None


def test_every_field_is_settable():
    settings = {
        "key_sparsity": 0,
        "value_sparsity": 0.75,
        "key_dtype": "int4",
        "value_dtype": "fp8",
        "window": 0,
        "basis": "b.safetensors",
    }
    expected = SparseKVConfig(0, 0.75, "int4", "fp8", 0, "auto", "b.safetensors")
    assert SparseKVConfig.from_dict(settings) == expected


def test_windows_of_int8_are_for_whole_integers():
    def window(**settings):
        config = SparseKVConfig.from_dict(settings)
        return config.window, config.window_dtype

    assert window() == window(key_dtype="int3", value_dtype="int3") == (112, "int8")
    assert window(preset="capacity", window=7) == (7, "int8")
    assert window(key_dtype="fp8") == window(value_sparsity=0.5) == (64, "auto")
    assert window(preset="capacity", key_sparsity=0.5, key_dtype="int4") == (64, "auto")
    assert window(key_sparsity=0.5, window=7) == (7, "auto")
    assert window(key_sparsity=0.5, window_dtype="int8") == (64, "int8")


def test_preset_is_the_start_and_single_fields_win():
    settings = {"value_dtype": "auto", "preset": "quality", "window": 7, "key_sparsity": 0.125}
    expected = replace(
        SparseKVConfig(**PRESETS["quality"]),
        value_dtype="auto",
        window=7,
        window_dtype="auto",
        key_sparsity=0.125,
    )
    assert SparseKVConfig.from_dict(settings) == expected
    assert expected != SparseKVConfig(**PRESETS["capacity"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_name_what_they_set(name):
    config = SparseKVConfig.from_dict({"preset": name})
    for field, value in PRESETS[name].items():
        assert getattr(config, field) == value


@pytest.mark.parametrize("field", ["key_sparsity", "value_sparsity"])
@pytest.mark.parametrize(
    "value", [1, 1.0, -0.001, 1.5, math.nan, math.inf, -math.inf, "0.5", None, True, False, [0.5]]
)
def test_bad_sparsity(field, value):
    assert refusal({field: value}) == f"sparsekv.{field}={value!r}: {SPARSITY}"


@pytest.mark.parametrize("field", ["key_dtype", "value_dtype"])
@pytest.mark.parametrize("value", ["bf16", "AUTO", "", None, 8, ["fp8"], {"fp8": 1}])
def test_bad_dtype(field, value):
    message = f"sparsekv.{field}={value!r}: must be one of {DTYPES[field]}"
    assert refusal({field: value, "basis": "b"}) == message


def test_two_bands_are_for_keys_in_a_calibrated_basis():
    wanted = f"sparsekv.value_dtype='int4_int2': must be one of {DTYPES['value_dtype']}"
    assert refusal({"value_dtype": "int4_int2", "basis": "b"}) == wanted
    wanted = (
        "sparsekv.basis='none': must be 'auto' or a file of sparsekv-calibrate with "
        "key_dtype='int4_int2'"
    )
    assert refusal({"key_dtype": "int4_int2", "basis": "none"}) == wanted
    assert SparseKVConfig.from_dict({"key_dtype": "int4_int2"}).basis == "auto"
    assert SparseKVConfig(key_dtype="int4_int2", basis="b").key_sparsity == 0


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(("key", "value"), ("int3", "int2")), ("key", "int4_int2")],
)
def test_few_bits_take_whole_vectors_only(kind, dtype):
    message = refusal({f"{kind}_dtype": dtype, f"{kind}_sparsity": 0.5, "basis": "b"})
    assert message == (
        f"sparsekv.{kind}_sparsity=0.5: must be 0 with {kind}_dtype={dtype!r}; "
        "int4, fp8 and auto can be pruned"
    )


@pytest.mark.parametrize("value", [-1, 64.0, "64", None, True, math.nan, [64]])
def test_bad_window(value):
    assert refusal({"window": value}) == f"sparsekv.window={value!r}: {WINDOW}"


@pytest.mark.parametrize("value", [3, True, None, "", ["b"], Path("b")])
def test_bad_basis(value):
    wanted = "must be 'auto', 'none' or a path (string)"
    assert refusal({"basis": value}) == f"sparsekv.basis={value!r}: {wanted}"


@pytest.mark.parametrize("value", [0, 1023, -5, 2048.0, "8192", None, True])
def test_bad_calibration_tokens(value):
    wanted = f"sparsekv.calibration_tokens={value!r}: must be an integer >= 1024"
    assert refusal({"calibration_tokens": value}) == wanted


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_only_integers_change_basis(dtype):
    message = refusal({"basis": "b", "key_dtype": dtype, "value_dtype": "fp8"})
    assert message == (
        f"sparsekv.basis='b': must be 'auto' or 'none' with key_dtype={dtype!r}, "
        "value_dtype='fp8': only integers change basis"
    )
    assert SparseKVConfig(key_dtype=dtype, basis="b").basis == "b"
    assert SparseKVConfig(value_dtype=dtype, basis="b").basis == "b"


@pytest.mark.parametrize("value", ["fast", "", 1, ["capacity"], {}])
def test_bad_preset(value):
    message = refusal({"preset": value})
    assert message == f"sparsekv.preset={value!r}: must be one of {sorted(PRESETS)}"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("key_sparsty", "key_sparsity"),
        ("valuesparsity", "value_sparsity"),
        ("windows", "window"),
        ("Preset", "preset"),
        ("key_dtypes", "key_dtype"),
    ],
)
def test_unknown_setting_names_the_nearest(name, nearest):
    message = refusal({name: 0.5})
    expected = f"sparsekv.{name}: unknown setting, did you mean {nearest!r}? valid: {SETTINGS}"
    assert message == expected


@pytest.mark.parametrize("name", ["zzz", "", 3, None])
def test_unknown_setting_without_a_near_name_lists_all(name):
    assert refusal({name: 0.5}) == f"sparsekv.{name}: unknown setting, valid: {SETTINGS}"


@pytest.mark.parametrize("settings", ["key_sparsity=0.5", [("window", 3)], 3, False])
def test_settings_that_are_no_mapping(settings):
    assert refusal(settings) == f"sparsekv={settings!r}: must be a mapping of settings"


def refusal(settings) -> str:
    with pytest.raises(ValueError) as error:
        SparseKVConfig.from_dict(settings)
    return str(error.value)
