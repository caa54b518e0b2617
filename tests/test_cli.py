"""The ``sparsekv`` command: numbers, cures, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import MODEL, ROOT
from test_planning import GEMMA_27B, LLAMA_8B
from vllm.config import ModelConfig

from vllm_sparsekv.engine import calibrate, cli, doctor, inspection
from vllm_sparsekv.engine.compat import offline
from vllm_sparsekv.engine.inspection import Cache, Inspection, Layers
from vllm_sparsekv.engine.transfer.spec import chunk_bytes
from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import build, ops


@pytest.fixture
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two that differ most, for time's sake."""
    few = {name: inspection.PRESETS[name] for name in ("safe", "capacity")}
    monkeypatch.setattr(inspection, "PRESETS", few)


def test_inspect_says_what_vllm_will_plan(presets: None) -> None:
    found = inspection.inspect({"model": str(MODEL), "max_model_len": 8192}, 1 << 30)
    # 30 layers of 3 KV heads: keys and values of 64 elements, pruned ones with 8 bytes of bitmap.
    # A ring page is as large as a sparse one, of 64 tokens, and holds as many slots as fit.
    assert found == Inspection(
        model=str(MODEL),
        dtype="bfloat16",
        max_model_len=8192,
        memory=1 << 30,
        layers=[Layers(30, None, 3, 64)],
        sharing=0,
        states=0,
        calibration=found.calibration,
        caches=[
            Cache("dense", "bfloat16", 90 * 256, 1.0, 128, 0, "bfloat16", 0, 46592),
            Cache(
                "safe",
                "keys fp8 pruned by 50%, values int4",
                90 * (8 + 32 + 32 + 2),
                3.459,
                64,
                4 * (74 * 64 // 264),
                "bfloat16",
                90 * 4 * 64 * 74,
                156330,
            ),
            Cache(
                "capacity",
                "keys int4_int2, values int2",
                90 * (24 + 4 + 16 + 2),
                5.565,
                64,
                6 * (46 * 64 // 136),
                "int8",
                90 * 6 * 64 * 46,
                247716,
            ),
        ],
    )


def test_inspect_reads_no_weights_and_tells_layers_apart(
    presets: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A model of 27 billion parameters, of which there is a configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_27B))
    options = ["--dtype", "bfloat16", "--max-model-len", "32768", "--memory", "10"]
    cli.main(["inspect", str(tmp_path), "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [
        {"count": 52, "sliding_window": 1024, "num_kv_heads": 16, "head_size": 128},
        {"count": 10, "sliding_window": None, "num_kv_heads": 16, "head_size": 128},
    ]
    assert found["memory"] == 10 << 30 and found["calibration"] is None
    assert [cache["token_bytes"] for cache in found["caches"]] == [
        62 * 16 * 512,
        62 * 16 * (16 + 64 + 64 + 2),
        62 * 16 * (48 + 4 + 32 + 2),
    ]


def test_the_guide_has_the_bytes_of_every_tier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "pages" / "guide.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| ([\d, |]+) \|$", text, re.MULTILINE)
    said = {name: [int(cell.replace(",", "")) for cell in cells.split("|")] for name, cells in rows}
    presets = {name: preset for name, preset in inspection.PRESETS.items() if name in said}
    assert said.keys() == {"dense", *presets} and "balanced" in presets
    monkeypatch.setattr(inspection, "PRESETS", presets)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for place, model in enumerate([MODEL, tmp_path]):
        options = {"model": str(model), "max_model_len": 8192, "dtype": "bfloat16"}
        for cache in inspection.inspect(options, 1 << 33).caches:
            kept = cache.token_bytes
            if cache.preset != "dense":
                kept = chunk_bytes(cache.token_bytes * cache.block_size) / cache.block_size
            assert said[cache.preset][2 * place : 2 * place + 2] == [cache.token_bytes, kept]


def test_a_cache_too_small_for_one_request_is_said(presets: None) -> None:
    found = inspection.inspect({"model": str(MODEL), "max_model_len": 8192}, 1 << 27)
    assert [cache.tokens for cache in found.caches][0] is None
    assert "\n- not one request of max_model_len: more" in inspection.describe(found)


def test_the_report_is_aligned() -> None:
    caches = [
        Cache("dense", "bfloat16", 2048, 1.0, 16, 0, "bfloat16", 0, 1000),
        Cache("balanced", "int4, int3", 500, 4.096, 64, 112, "int8", 4500, 4100),
        Cache("safe", "keys fp8", 600, 3.413, 64, 70, "bfloat16", 4500, None),
    ]
    layers = [Layers(4, None, 2, 64), Layers(20, 1024, 2, 64)]
    found = Inspection("a-model", "bfloat16", 8192, 3 << 29, layers, 2, 1, "/b.st", caches)
    expected = """\
a-model, bfloat16, max_model_len 8,192
  4 layers of full attention: 2 KV heads of 64
  20 layers of sliding window of 1,024 tokens: 2 KV heads of 64
  2 layers read the cache of another
  1 layers with a state, which stays vLLM's

calibration: /b.st

preset      bytes/token  ratio  block       window  ring bytes  tokens  vs dense  stored
dense             2,048  1.00x     16            0           0   1,000     1.00x  bfloat16
balanced *          500  4.10x     64     112 int8       4,500   4,100     4.10x  int4, int3
safe                600  3.41x     64  70 bfloat16       4,500       -            keys fp8

* the default. Bytes of all layers, without the window; ring bytes of a request; tokens in 1.5 GiB.
- not one request of max_model_len: more --memory, less --max-model-len."""
    assert inspection.describe(found) == expected


REFUSED_BY_VLLM = {
    ("--max-model-len", "-3"): "max_model_len=-3: Input should be greater than or equal to -1",
    ("--max-model-len", "100000"): "User-specified max_model_len (100000) is greater than the",
    ("--max-model-len", "0"): "max_model_len must be a positive integer, got int: 0.",
    ("--tensor-parallel-size", "0"): "tensor_parallel_size=0: Input should be greater than or",
    ("--tensor-parallel-size", "5"): "Total number of attention heads (9) must be divisible by",
    ("--quantization", "awq"): "Cannot find the config file for awq",
    ("--gpu-memory-utilization", "7"): "gpu_memory_utilization=7.0: Input should be less than",
    ("--speculative-config", '{"method": "nope"}'): "method='nope': Input should be 'ngram', ",
    ("--hf-overrides", "{bad"): "hf_overrides.dict[str,any]='{bad': Input should be a valid dict",
    ("--config", "/no/file"): "Config file must be of a yaml/yml type. /no/file supplied",
    ("--block-size", "7"): "block_size=7: must be a positive multiple of 16",
    ("--block-size", "1000000"): "block_size=1000000: must be <= 8192, max_model_len",
    ("--kv-transfer-config", '{"kv_connector": "Foo", "kv_role": "kv_both"}'): "Unsupported conn",
}


@pytest.mark.parametrize(
    ("dtype", "native", "free", "expected"),
    [
        ("bfloat16", False, 2**40, True),
        ("bfloat16", True, 2**40, False),
        ("float16", False, 2**40, True),
        ("float32", False, 2**40, False),
        ("bfloat16", False, 2**20, False),
    ],
)
def test_models_in_a_dtype_that_the_cpu_emulates_are_calibrated_in_float32(
    dtype: str, native: bool, free: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: native)
    memory = SimpleNamespace(available=free)
    monkeypatch.setattr(offline.psutil, "virtual_memory", lambda: memory)
    options = {"model": str(MODEL), "dtype": dtype}
    assert offline.emulates_dtype(offline.model_config(options)) is expected
    if expected:
        at_edge = 6 * sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
        for memory.available, enough in ((at_edge, False), (at_edge + 1, True)):
            assert offline.emulates_dtype(offline.model_config(options)) is enough
        monkeypatch.setattr(ModelConfig, "is_hybrid", True)
        assert not offline.emulates_dtype(offline.model_config(options))


@pytest.mark.parametrize("options", REFUSED_BY_VLLM, ids=" ".join)
def test_what_vllm_refuses_is_one_line(options: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["inspect", str(MODEL), *options])
    said = str(error.value.code)
    assert said.startswith(f"error: {REFUSED_BY_VLLM[options]}") and len(said.splitlines()) == 1
    assert "pydantic" not in said and "[type=" not in said


def test_a_cache_dtype_of_another_is_refused_before_calibration() -> None:
    with pytest.raises(SystemExit, match=r"^error: kv_cache_dtype='nvfp4': must be 'auto' or"):
        cli.main(["calibrate", str(MODEL), "--kv-cache-dtype", "nvfp4"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "Invalid repository ID or local directory specified: "),
        ("{nope", "is not a valid JSON file."),
        ("{}", "Should have a `model_type` key in its config.json."),
    ],
)
def test_a_folder_without_a_model_is_named(
    config: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before vLLM tries once more
    for command in ("inspect", "calibrate"):
        with pytest.raises(SystemExit) as error:
            cli.main([command, str(tmp_path)])
        said = str(error.value.code)
        assert said.startswith("error: ") and message in said and str(tmp_path) in said
        assert len(said.splitlines()) == 1


WRONG = {
    "": "the following arguments are required: COMMAND",
    "inspct": "argument COMMAND: invalid choice: 'inspct'",
    "inspect": "the following arguments are required: model",
    "inspect MODEL more": "unrecognized arguments: more",
    "inspect MODEL --no-such-option": "unrecognized arguments: --no-such-option",
    "inspect MODEL --dtype int8": "argument --dtype: invalid choice: 'int8' (choose from 'auto'",
    "inspect MODEL --max-model-len abc": "argument --max-model-len: invalid human_readable_int",
    "inspect MODEL --memory 0": "--memory 0: must be > 0 and <= 1048576 (GiB)",
    "inspect MODEL --memory -1": "--memory -1: must be > 0 and <= 1048576 (GiB)",
    "inspect MODEL --memory nan": "--memory nan: must be > 0 and <= 1048576 (GiB)",
    "inspect MODEL --memory inf": "--memory inf: must be > 0 and <= 1048576 (GiB)",
    "inspect MODEL --memory much": "argument --memory: invalid float value: 'much'",
    'inspect MODEL --additional-config {"sparsekv":{}}': "--additional-config: every preset is",
    "inspect MODEL --attention-backend sparsekv": "--attention-backend: every preset is shown, ",
    "doctor more": "unrecognized arguments: more",
    "doctor --jsn": "unrecognized arguments: --jsn",
    "calibrate": "the following arguments are required: model",
    "calibrate MODEL --dtpye float32": "unrecognized arguments: --dtpye float32",
    'calibrate MODEL --additional-config {"sparsekv":{}}': "--additional-config: a basis serves",
    "calibrate MODEL --attention-backend x": "--attention-backend: a basis serves all settings, ",
    "calibrate MODEL --tokens -1": "--tokens -1: must be > 1",
    "calibrate MODEL --tokens many": "argument --tokens: invalid int value: 'many'",
    "calibrate MODEL --length 1": "--length 1: must be > 1 and <= 8192, a text's --tokens",
    "calibrate MODEL --length 9000": "--length 9000: must be > 1 and <= 8192, a text's --tokens",
    "calibrate MODEL --text TMP/none": "--text TMP/none: No such file or directory",
    "calibrate MODEL --text TMP": "--text TMP: Is a directory",
    "calibrate MODEL --text TMP/latin": "--text TMP/latin: 'utf-8' codec can't decode byte 0xff",
    "calibrate MODEL --output TMP/no/b": "--output TMP/no/b: there is no folder TMP/no",
    "calibrate MODEL --output TMP": "--output TMP: is a folder, must be a file to write",
    "calibrate MODEL --output /proc/b": "--output /proc/b: No such file or directory",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_arguments_are_named(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In a line after the usage, before anything is loaded."""
    (tmp_path / "latin").write_bytes(b"\xff")
    words = [word.replace("TMP", str(tmp_path)) for word in line.split()]
    with pytest.raises(SystemExit) as error:
        cli.main([str(MODEL) if word == "MODEL" else word for word in words])
    *usage, said = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert f"error: {WRONG[line]}".replace("TMP", str(tmp_path)) in said
    assert usage[0].startswith("usage: sparsekv") and len(usage) <= 3


def test_the_last_word_of_a_failed_calibration_is_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which the engine that wanted it then logs."""

    def fail(**arguments: Any) -> None:
        raise ValueError("out of\nluck")

    monkeypatch.setattr(calibrate, "calibrate", fail)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(pickle.dumps({}))))
    with pytest.raises(SystemExit, match="^ValueError: out of luck$"):
        calibrate.serve_standard_input()


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (cli.main, []),
        *((cli.main, [command]) for command in cli.COMMANDS),
        (calibrate.main, []),
    ],
)
def test_help_fits_a_screen(main: Any, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "--help" in "".join(lines) and len(lines) <= 24
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_a_command_prints_nothing_but_its_report() -> None:
    code = "from vllm_sparsekv.engine.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == ""
    names = [finding["name"] for finding in json.loads(done.stdout)]
    assert names[:2] == ["vllm_sparsekv", "python"] and names[-1] == "calibrations"


@pytest.fixture
def fresh_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    build.library.cache_clear()
    api.implementation.cache_clear()
    yield
    monkeypatch.undo()
    build.library.cache_clear()
    ops.use_isa(None)


@pytest.mark.parametrize(
    ("environment", "name", "found", "cure"),
    [
        ({"VLLM_PLUGINS": "other,more"}, "plugin", "VLLM_PLUGINS=other,more", "add sparsekv"),
        ({"VLLM_PLUGINS": "sparsekv,more"}, "plugin", "loaded by vLLM", None),
        ({"SPARSEKV_KERNELS": "foo"}, "kernels", "SPARSEKV_KERNELS='foo'", "unset SPARSEKV_KER"),
        ({"SPARSEKV_KERNELS": "reference"}, "kernels", "torch reference", None),
        ({"XDG_CACHE_HOME": "/proc/none"}, "kernel cache", "/proc/none", "set XDG_CACHE_HOME to"),
        ({"XDG_CACHE_HOME": "{tmp}", "CXX": "no-such"}, "kernels", "no-such", "install g++ or set"),
        ({"XDG_CACHE_HOME": "{tmp}", "CXX": "no-such"}, "C++ compiler", "none: no C++", None),
    ],
)
def test_doctor_names_the_cure(
    environment: dict[str, str],
    name: str,
    found: str,
    cure: str | None,
    fresh_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    if environment.get("XDG_CACHE_HOME") == "/proc/none":
        ready = build.library()
        monkeypatch.setattr(build, "library", lambda: ready)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value.format(tmp=tmp_path))
    with pytest.raises(SystemExit) as done:
        doctor.main([])
    report = capsys.readouterr().out
    (line,) = (line for line in report.splitlines() if line[4:].lstrip().startswith(f"{name}  "))
    assert found in line and line.startswith("FAIL" if cure else "ok ")
    if cure:
        assert f"\n\n{name}: {cure}" in report and done.value.code
    elif "CXX" not in environment:
        assert not done.value.code and "FAIL" not in report


def test_doctor_without_vllm(monkeypatch: pytest.MonkeyPatch, fresh_kernels: None) -> None:
    monkeypatch.delattr("vllm_sparsekv.engine.compat")
    monkeypatch.setitem(sys.modules, "vllm_sparsekv.engine.compat", None)
    found = {finding.name: finding for finding in doctor.examine()}
    assert "pip install 'vllm>=0.32,<0.34'" in found["vllm"].cure
    assert found["kernels"].cure is None
