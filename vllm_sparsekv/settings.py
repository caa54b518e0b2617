"""User settings: ``additional_config={"sparsekv": {...}}`` or ``--additional-config``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from vllm_sparsekv.format.codecs import CODECS

PRESETS: dict[str, dict[str, Any]] = {
    name: {
        "key_sparsity": key_sparsity,
        "value_sparsity": value_sparsity,
        "key_dtype": key_dtype,
        "value_dtype": value_dtype,
        "window": window,
        "window_dtype": window_dtype,
    }
    for name, key_sparsity, key_dtype, value_sparsity, value_dtype, window, window_dtype in (
        ("quality", 0.0, "int4", 0.0, "int4", 112, "int8"),
        ("balanced", 0.0, "int4", 0.0, "int3", 112, "int8"),
        ("capacity", 0.0, "int4_int2", 0.0, "int2", 126, "int8"),
        ("safe", 0.5, "fp8", 0.0, "int4", 64, "auto"),
        ("sparse-50", 0.5, "fp8", 0.5, "fp8", 64, "auto"),
        ("sparse-70", 0.7, "fp8", 0.7, "fp8", 64, "auto"),
    )
}
"""Points on the curve of bytes against quality (``make bench-accuracy``).

What each costs is in ``docs/pages/benchmarks.md``, which is written from the results. A window of
int8 holds nearly twice the tokens of one in 16 bits, and at 8 bits the nearest tokens lose nothing
that could be measured; it is for vectors that are rotated, whose elements are of one size.
In a basis pruned vectors of the same bytes lose more than whole ones in fewer bits.
"""

CACHE_DTYPES = {"sparsekv": None} | {f"sparsekv_{name.replace('-', '')}": name for name in PRESETS}
"""Names for ``--kv-cache-dtype`` and the presets they stand for; None for the default one."""

WITHOUT_BASIS = {"capacity": {"key_dtype": "int3", "value_dtype": "int3"}}
"""What presets name that need a basis where there is none."""

CALIBRATED_DEFAULT = "balanced"
UNCALIBRATED_DEFAULT = "safe"
"""Presets of who names none. Keys in integers need a basis: without one they can ruin a model.

``safe`` lost least of what is at least 3x below bfloat16 over two models and eight damaged ones
(key offsets of 30 to 300 as key biases make, huge channels, a huge first token).
"""

WINDOW_DTYPES = ("auto", "int8")

PRUNED_DTYPE = "fp8"
"""Of pruned vectors where no dtype is named."""


@dataclass(frozen=True)
class SparseKVConfig:
    """Validated settings; the defaults are those of a model with a basis.

    Attributes:
        key_sparsity: share of each key vector that is dropped, 0 <= s < 1.
        value_sparsity: share of each value vector that is dropped, 0 <= s < 1.
        key_dtype: how surviving key elements are stored, a name in ``codecs.CODECS``; "int4_int2"
            needs a basis.
        value_dtype: the same for value elements, without "int4_int2".
        window: newest tokens of a request that stay whole, >= 0.
        window_dtype: how elements of theirs are stored: "auto", in the model's own dtype, or
            "int8", with a step per vector.
        basis: in which integer keys and values are stored: "auto", one calibrated for this model
            when it is first served and kept; path of a file written by ``sparsekv-calibrate``; or
            "none".
        calibration_tokens: that a model reads when it is calibrated for "auto"; fewer take less
            time.
        basis_sha256: of the basis file, which every process that reads it must find; None for any.
        skip_layers: decoder layers that stay dense: indices, negative ones from the end, and the
            words "sliding" and "full".
    """

    key_sparsity: float = 0.0
    value_sparsity: float = 0.0
    key_dtype: str = "int4"
    value_dtype: str = "int3"
    window: int = 112
    window_dtype: str = "int8"
    basis: str = "auto"
    calibration_tokens: int = 8192
    basis_sha256: str | None = None
    skip_layers: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("key_sparsity", "value_sparsity"):
            value = getattr(self, name)
            if not _is_number(value) or math.isnan(value) or not 0 <= value < 1:
                raise _invalid(name, value, "a number s with 0 <= s < 1")
        for name in ("key_dtype", "value_dtype"):
            value = getattr(self, name)
            bands = 2 if name == "key_dtype" else 1
            valid = sorted(codec for codec in CODECS if CODECS[codec].bands <= bands)
            if not isinstance(value, str) or value not in valid:
                raise _invalid(name, value, f"one of {valid}")
        for kind in ("key", "value"):
            sparsity = getattr(self, f"{kind}_sparsity")
            dtype = getattr(self, f"{kind}_dtype")
            if CODECS[dtype].whole_only and sparsity:
                raise _invalid(
                    f"{kind}_sparsity",
                    sparsity,
                    f"0 with {kind}_dtype={dtype!r}; int4, fp8 and auto can be pruned",
                )
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 0:
            raise _invalid("window", self.window, "an integer >= 0 (tokens)")
        if self.window_dtype not in WINDOW_DTYPES:
            raise _invalid("window_dtype", self.window_dtype, f"one of {list(WINDOW_DTYPES)}")
        if not isinstance(self.basis, str) or not self.basis:
            raise _invalid("basis", self.basis, "'auto', 'none' or a path (string)")
        if self.basis not in ("auto", "none") and not self.takes_basis:
            expected = (
                "'auto' or 'none' with key_dtype={!r}, value_dtype={!r}: only integers change basis"
            )
            raise _invalid("basis", self.basis, expected.format(self.key_dtype, self.value_dtype))
        if self.basis == "none" and CODECS[self.key_dtype].bands > 1:
            expected = f"'auto' or a file of sparsekv-calibrate with key_dtype={self.key_dtype!r}"
            raise _invalid("basis", "none", expected)
        tokens = self.calibration_tokens
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1024:
            raise _invalid("calibration_tokens", tokens, "an integer >= 1024")
        if self.basis_sha256 is not None and not isinstance(self.basis_sha256, str):
            raise _invalid("basis_sha256", self.basis_sha256, "None or a string")
        skip = self.skip_layers
        if not isinstance(skip, (list, tuple)) or not all(map(_is_layer, skip)):
            raise _invalid("skip_layers", skip, "a list of indices and the words 'sliding', 'full'")
        object.__setattr__(self, "skip_layers", tuple(skip))

    @property
    def takes_basis(self) -> bool:
        """Whether a basis changes anything: only integers are stored in one."""
        return any(CODECS[dtype].integer for dtype in (self.key_dtype, self.value_dtype))

    @property
    def basis_path(self) -> str | None:
        """Of the file, once it is known; None where vectors stay in the model's own basis."""
        return None if self.basis in ("auto", "none") else self.basis

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | None) -> SparseKVConfig:
        """Build from the user's mapping; ``preset`` first, then single fields on top of it.

        Who names neither preset nor anything about keys gets those of the default preset, which
        depends on whether there is a basis; likewise values. Pruned vectors without a named dtype
        take ``PRUNED_DTYPE``. A window of int8 is for whole integers, which are rotated: with other
        keys or values who names nothing about the window gets that of ``UNCALIBRATED_DEFAULT``.

        Raises:
            ValueError: names the field, the value and the valid set.
        """
        if settings is None:
            return cls()
        if not isinstance(settings, Mapping):
            raise ValueError(f"sparsekv={settings!r}: must be a mapping of settings")
        valid = list(SETTING_NAMES)
        for name in settings:
            if name not in valid:
                near = difflib.get_close_matches(str(name), valid, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"sparsekv.{name}: unknown setting, {hint}valid: {valid}")
        given = dict(settings)
        preset = given.pop("preset", None)
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise _invalid("preset", preset, f"one of {sorted(PRESETS)}")
        uncalibrated = given.get("basis") == "none"
        name = preset or (UNCALIBRATED_DEFAULT if uncalibrated else CALIBRATED_DEFAULT)
        values = PRESETS[name] | (WITHOUT_BASIS.get(name, {}) if uncalibrated else {})
        for kind in ("key", "value"):
            sparsity, dtype = f"{kind}_sparsity", f"{kind}_dtype"
            if preset is None and (sparsity in given or dtype in given):
                values |= {sparsity: 0.0, dtype: PRESETS[CALIBRATED_DEFAULT][dtype]}
            named = preset is not None and not CODECS[values[dtype]].whole_only
            if given.get(sparsity) and dtype not in given and not named:
                values[dtype] = PRUNED_DTYPE
        config = cls(**(values | given))
        whole = config.key_sparsity == config.value_sparsity == 0
        if whole and all(CODECS[x].integer for x in (config.key_dtype, config.value_dtype)):
            return config
        safe = PRESETS[UNCALIBRATED_DEFAULT]
        names = ("window", "window_dtype")
        return replace(config, **{name: safe[name] for name in names if name not in given})

    @property
    def vectors(self) -> str:
        """What keys and values are stored as, for people."""
        return ", ".join(
            f"{kind}s {getattr(self, f'{kind}_dtype')}"
            + (
                f" pruned by {sparsity:.0%}"
                if (sparsity := getattr(self, f"{kind}_sparsity"))
                else ""
            )
            for kind in ("key", "value")
        )


SETTING_NAMES = ("preset", *(field.name for field in fields(SparseKVConfig)))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_layer(value: Any) -> bool:
    is_index = isinstance(value, int) and not isinstance(value, bool)
    return is_index or value in ("sliding", "full")


def _invalid(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"sparsekv.{name}={value!r}: must be {expected}")
