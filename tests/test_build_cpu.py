"""Building the native kernels, choosing them, and doing without them."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from helpers import CaseSpec, Request
from histories import build_case

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


SHELL = shutil.which("sh")
BROKEN_COMPILERS = {
    "no-such-compiler g++": "no C++ compiler found (looked for no-such-compiler; set CXX)",
    "g++ '-m64": 'CXX="g++ \'-m64": No closing quotation',
    "true": "/0.o failed: it wrote nothing",
    "sh -c 'echo a.cpp: error: no; echo b >&2; exit 1'": " failed: b",
    "sh -c 'echo b >&2; echo a: error: no >&2; echo c >&2; exit 1'": " failed: a: error: no",
}


@pytest.mark.parametrize("command", BROKEN_COMPILERS)
def test_a_broken_compiler_is_said_in_one_line(command, no_compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError) as error:
        build.library()
    assert BROKEN_COMPILERS[command] in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert os.listdir(tmp_path / "vllm_sparsekv" / "kernels") == ["lock"]


def test_what_is_no_program_is_no_compiler(no_compiler, monkeypatch, tmp_path):
    program = tmp_path / "compiler"
    program.write_bytes(b"\0")
    program.chmod(0o700)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(build.BuildError, match=f"compiler cannot be run: .*Exec format.*{program}"):
        build.library()


@pytest.mark.parametrize("options", [[], ["-m64", "-DNAME=a b"]])
def test_the_compiler_is_split_as_shells_do(options, monkeypatch):
    monkeypatch.setenv("CXX", " ".join(["sh", *(f"'{option}'" for option in options)]))
    assert build.compiler() == [SHELL, *options]


@pytest.fixture
def own_cache(monkeypatch, tmp_path, fresh_choice):
    """An empty cache folder, and a compiler that takes no time: it copies the library."""
    ready = build.find(build.cache_dir() / "kernels") or Path(build.library()._name)
    script = tmp_path / "compiler.sh"
    script.write_text(
        f'for out; do :; done; touch "$out"; case "$*" in *-shared*)'
        f' cp {ready} "$out"; echo >> {tmp_path}/compiled ;; esac'
    )
    monkeypatch.setenv("CXX", f"sh {script} -x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    build.library.cache_clear()
    yield tmp_path / "cache" / "vllm_sparsekv" / "kernels"
    monkeypatch.undo()
    build.library.cache_clear()
    ops.use_isa(None)


def compiled(folder):
    """How often the compiler ran."""
    log = folder.parents[2] / "compiled"
    return len(log.read_text()) if log.exists() else 0


def load_again(caplog):
    """The folder the library is loaded from, and what was warned of."""
    build.library.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="vllm.sparsekv.kernels"):
        library = build.library()
    assert hasattr(library, "sparsekv_pack_portable")
    return Path(library._name).parent, [record.getMessage() for record in caplog.records]


def test_a_library_is_found_without_a_compiler(own_cache, caplog, monkeypatch):
    assert load_again(caplog) == (own_cache, []) and compiled(own_cache) == 1
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_again(caplog) == (own_cache, []) and compiled(own_cache) == 1


def test_what_is_kept_is_for_its_owner_alone(own_cache):
    before = os.umask(0o002)
    try:
        build.library()
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in own_cache.iterdir()}
    assert modes == {".so": 0o600, "": 0o600} and own_cache.stat().st_mode & 0o777 == 0o700


def chown(path):
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


SPOILT = {
    "truncated": lambda path: os.truncate(path, 5000),
    "emptied": lambda path: os.truncate(path, 0),
    "another's content": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "writable by others": lambda path: path.chmod(0o666),
    "writable by the group": lambda path: path.chmod(0o620),
    "another user's": chown,
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_library_that_is_not_what_was_built_is_compiled_again(how, own_cache, caplog):
    path = build.build(own_cache)
    content = path.read_bytes()
    SPOILT[how](path)
    folder, warnings = load_again(caplog)
    assert folder == own_cache and compiled(own_cache) == 2
    assert warnings == [f"sparsekv: {path} is damaged or not ours, removed"]
    assert [found.read_bytes() for found in own_cache.glob("*.so")] == [content]
    assert load_again(caplog) == (own_cache, []) and compiled(own_cache) == 2


UNSAFE = {
    "writable by others": lambda path: path.chmod(0o777),
    "another user's": chown,
}


@pytest.mark.parametrize("how", UNSAFE)
@pytest.mark.parametrize("what", [".", "lock"])
def test_a_folder_others_have_a_hand_in_is_not_used(what, how, own_cache, caplog):
    own_cache.mkdir(parents=True, mode=0o700)
    (own_cache / "lock").touch(mode=0o600)
    UNSAFE[how](own_cache / what)
    folder, (warning,) = load_again(caplog)
    assert folder.parent == Path(tempfile.gettempdir()) and compiled(own_cache) == 1
    assert re.search("belongs to user 12345|can be written to by others .mode 777", warning)
    assert os.listdir(own_cache) == ["lock"] and os.listdir(folder.parent) == []


def file_in_its_place(own_cache, monkeypatch):
    own_cache.parent.parent.mkdir()
    own_cache.parent.touch()


def no_such_disk(own_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")


def no_home(own_cache, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


def link_for_a_lock(own_cache, monkeypatch):
    own_cache.mkdir(parents=True, mode=0o700)
    (own_cache / "lock").symlink_to(own_cache / "elsewhere")


@pytest.mark.parametrize("spoil", [file_in_its_place, no_such_disk, no_home, link_for_a_lock])
def test_without_a_cache_folder_one_warning_and_nothing_left(spoil, own_cache, monkeypatch, caplog):
    spoil(own_cache, monkeypatch)
    folder, warnings = load_again(caplog)
    assert folder.parent == Path(tempfile.gettempdir()) and os.listdir(folder.parent) == []
    assert len(warnings) == 1 and "compiled at every start" in warnings[0]


def test_nowhere_to_compile_is_a_build_error(own_cache, monkeypatch):
    no_such_disk(own_cache, monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(build.BuildError, match="can be kept nowhere: .*/proc/none"):
        build.library()


def test_a_killed_build_leaves_nothing_to_the_next(own_cache):
    script = own_cache.parents[2] / "slow.sh"
    script.write_text('mktemp; for out; do :; done; touch "$out"; exec sleep 60')
    code = "from vllm_sparsekv.kernels.cpu import build; build.library()"
    killed = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"CXX": f"sh {script}"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    remains = ("*/0.o", "*/tmp.*")
    while not all(map(list, map(own_cache.glob, remains))):
        assert time.monotonic() < deadline, "the compiler has not begun"
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert all(map(list, map(own_cache.glob, remains)))
    build.library()
    assert sorted(path.suffix for path in own_cache.iterdir()) == ["", ".so"]


def test_a_library_of_the_wheel_comes_first(own_cache, monkeypatch, caplog):
    shipped = own_cache.parents[2] / "prebuilt"
    path = build.build(shipped)
    path.chmod(0o644)
    monkeypatch.setattr(build, "PREBUILT", shipped)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load_again(caplog) == (shipped, []) and not own_cache.exists()
    path.rename(path.with_stem(path.stem[:-1] + "g"))
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        load_again(caplog)


def test_a_library_of_the_wheel_that_does_not_load_is_said(own_cache, monkeypatch, caplog):
    content = b"not for this machine"
    shipped = own_cache.parents[2] / "prebuilt"
    shipped.mkdir()
    digest = hashlib.sha256(content).hexdigest()
    (shipped / f"kernels-{build.key()}-{digest}.so").write_bytes(content)
    monkeypatch.setattr(build, "PREBUILT", shipped)
    folder, (warning,) = load_again(caplog)
    assert folder == own_cache and "of the wheel do not load" in warning


def test_unsupported_instruction_set_is_refused():
    with pytest.raises(ValueError, match="isa='sse9'.*portable"):
        ops.use_isa("sse9")


def test_processes_build_once(own_cache):
    code = "from vllm_sparsekv.kernels.cpu import build; build.library()"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert compiled(own_cache) == 1
    assert sorted(path.suffix for path in own_cache.iterdir()) == ["", ".so"]


def test_one_library_holds_every_instruction_set():
    """Also those this machine cannot run."""
    for kernel, isa in itertools.product(
        ("attention", "pack", "write_window"), build.compiled_isas()
    ):
        assert hasattr(build.library(), f"sparsekv_{kernel}_{isa}")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif("avx2" not in build.compiled_isas(), reason="one instruction set only")
def test_instructions_stay_in_their_functions():
    """What an older processor cannot run lies in functions of the newer instruction sets alone."""
    command = ["objdump", "-d", "--no-show-raw-insn", build.library()._name]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {isa: 0 for isa in build.ISA_FLAGS}
    isa = "portable"
    for line in listing.splitlines():
        if function := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            isa = next((name for name in build.ISA_FLAGS if name in function[1]), "portable")
        elif "%tmm" in line:
            found["amx"] += 1
            assert isa == "amx", line
        elif re.search(r"\tv(dpbf16ps|cvtne2?ps2?bf16) ", line):
            found["avx512_bf16"] += 1
            assert isa in ("amx", "avx512_bf16"), line
        elif re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]", line):
            found["avx512"] += 1
            assert isa in ("amx", "avx512_bf16", "avx512"), line
        elif re.search(
            r"%ymm|\tv[a-z0-9]+ |\t(popcnt|lzcnt|tzcnt|pdep|pext|shlx|sarx|shrx) ", line
        ):
            found["avx2"] += 1
            assert isa != "portable", line
    assert found["avx512"] > 1000 and found["avx2"] > 1000
    assert found["avx512_bf16"] > 10 and found["amx"] > 10


@pytest.mark.parametrize("isa", build.ISA_FLAGS)
def test_sanitizers_find_nothing(isa, tmp_path):
    if isa not in build.supported_isas():
        pytest.skip(f"this machine does not run {isa}")
    best = build.supported_isas()[0]
    if isa.startswith("avx512") and isa != best:
        pytest.skip(f"{best} holds its code")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    driver = tmp_path / "sanitize"
    flags = ["-std=c++17", "-O0", "-g1", "-w", "-fopenmp", *build.ISA_FLAGS[isa]]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(
        [compiler, *flags, *sanitizers, str(CPP / "sanitize.cpp"), "-o", str(driver)], check=True
    )
    # vLLM preloads libgomp from its first configuration on; the sanitizer must come first.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run([driver], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "34 batches\n"


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
