"""Building the native kernels, choosing them, and doing without them."""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CaseSpec, Request, build_case

from vllm_sparsekv.kernels import api
from vllm_sparsekv.kernels.cpu import build, ops

CPP = Path(__file__).parent / "cpp"


@pytest.fixture
def fresh_choice(monkeypatch):
    monkeypatch.delenv("SPARSEKV_KERNELS", raising=False)
    api.implementation.cache_clear()
    yield
    api.implementation.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path, fresh_choice):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield
    build.library.cache_clear()
    monkeypatch.undo()
    ops.use_isa(None)


def test_cpu_tensors_run_natively(fresh_choice):
    assert api.implementation("cpu").pack is ops.pack


def test_reference_on_request(fresh_choice, monkeypatch):
    monkeypatch.setenv("SPARSEKV_KERNELS", "reference")
    assert api.implementation("cpu") is api.REFERENCE


def test_unknown_choice_is_refused(fresh_choice, monkeypatch):
    monkeypatch.setenv("SPARSEKV_KERNELS", "fast")
    with pytest.raises(ValueError, match="SPARSEKV_KERNELS='fast'.*reference"):
        api.implementation("cpu")


def test_without_a_compiler_one_warning_and_the_reference(no_compiler, caplog):
    with caplog.at_level(logging.WARNING, logger="vllm.sparsekv.kernels"):
        for _ in range(3):
            assert api.implementation("cpu") is api.REFERENCE
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "no-such-compiler" in warnings[0]


def test_without_a_compiler_native_kernels_on_request_raise(no_compiler, monkeypatch):
    monkeypatch.setenv("SPARSEKV_KERNELS", "native")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        api.implementation("cpu")


def test_a_failing_compiler_is_quoted(no_compiler, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false .*failed"):
        build.build()


def test_unsupported_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa='sse9'.*portable"):
        ops.use_isa("sse9")


@pytest.fixture(scope="module")
def built_together(tmp_path_factory):
    """The cache folder after three processes that started together loaded the library."""
    cache = tmp_path_factory.mktemp("cache")
    code = "from vllm_sparsekv.kernels.cpu import build; build.library()"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    return cache / "vllm_sparsekv"


def test_processes_build_once(built_together):
    assert sorted(path.suffix for path in built_together.iterdir()) == [".lock", ".so"]


def test_one_library_holds_every_instruction_set(built_together):
    """Also those this machine cannot run."""
    (path,) = built_together.glob("*.so")
    library = ctypes.CDLL(str(path))
    for kernel, isa in itertools.product(
        ("attention", "pack", "write_window"), build.compiled_isas()
    ):
        assert hasattr(library, f"sparsekv_{kernel}_{isa}")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif("avx2" not in build.compiled_isas(), reason="one instruction set only")
def test_instructions_stay_in_their_functions(built_together):
    """What an older processor cannot run lies in functions of the newer instruction sets alone."""
    (path,) = built_together.glob("*.so")
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {isa: 0 for isa in build.ISA_FLAGS}
    isa = "portable"
    for line in listing.splitlines():
        if function := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            isa = next((name for name in ("avx512", "avx2") if name in function[1]), "portable")
        elif re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]", line):
            found["avx512"] += 1
            assert isa == "avx512", line
        elif re.search(
            r"%ymm|\tv[a-z0-9]+ |\t(popcnt|lzcnt|tzcnt|pdep|pext|shlx|sarx|shrx) ", line
        ):
            found["avx2"] += 1
            assert isa != "portable", line
    assert found["avx512"] > 1000 and found["avx2"] > 1000


@pytest.mark.parametrize("isa", build.ISA_FLAGS)
def test_sanitizers_find_nothing(isa, tmp_path):
    if isa not in build.supported_isas():
        pytest.skip(f"this machine does not run {isa}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "sanitize"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fopenmp", *build.ISA_FLAGS[isa]]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        [compiler, *flags, *sanitizers, str(CPP / "sanitize.cpp"), "-o", str(driver)], check=True
    )
    # vLLM preloads libgomp from its first configuration on; the sanitizer must come first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run([driver], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "102 batches\n"


SPEC = CaseSpec((Request(70, 2),), padding=0)
WRONG_ARGUMENTS = {
    0: (lambda x: x[..., :-16], "query has shape"),
    1: (lambda x: x.double(), "key is torch.float64"),
    2: (lambda x: x[:, :1], "value has shape"),
    3: (lambda x: x[..., :-1], "pages have shape"),
    4: (lambda x: None, "window is missing"),
    5: (lambda x: x.long(), "query_start_loc is 1-d torch.int64"),
    6: (lambda x: x[None], "seq_lens is 2-d"),
    7: (lambda x: x[0], "block_table is 1-d"),
    8: (lambda x: x[:, :1], "the ring has"),
}


@pytest.mark.parametrize("position", WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(position):
    case = build_case(SPEC)
    args = list(case.attention_args())
    spoil, message = WRONG_ARGUMENTS[position]
    args[position] = spoil(args[position])
    with pytest.raises(ValueError, match=message):
        api.sparse_attention(*args, torch.empty_like(case.query))
