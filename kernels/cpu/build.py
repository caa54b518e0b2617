"""Compile the native kernels on first use and keep the result.

One library holds the kernels for every instruction set of the machine's architecture, compiled from
the same sources; its entry points are named ``sparsekv_<kernel>_<instruction set>`` and ``ops``
chooses among them at run time. Its file is named ``kernels-<key>-<sha256 of its content>.so``: the
key covers the sources, the compiler's flags and torch (whose OpenMP runtime the library shares),
not the compiler, so what one has built serves where there is none. It is looked for beside this
file, where a wheel puts it, then in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("vllm.sparsekv.kernels")

KERNELS = Path(__file__).parent.parent
SOURCES = ("attention/cpu.cpp", "pack/cpu.cpp", "step/cpu.cpp", "window/cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    *("-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni"),
)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
"""Instruction sets from best to plainest, and what the compiler needs for each."""

_AVX512_CPU = {
    *("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512vbmi", "avx512_vbmi2", "avx512_vnni"),
}
_CPU_FLAGS = {
    "amx": _AVX512_CPU | {"avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": _AVX512_CPU | {"avx512_bf16"},
    "avx512": _AVX512_CPU,
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "abm"},
    "portable": set(),
}

PREBUILT = Path(__file__).parent / "prebuilt"
"""What a wheel brings along; trusted as the code beside it is."""


class BuildError(RuntimeError):
    """No library: no compiler, or it failed; the message says which and how."""


def supported_isas() -> list[str]:
    """The instruction sets this machine can run, best first."""
    flags = _cpu_flags()
    return [isa for isa, needed in _CPU_FLAGS.items() if needed <= flags]


def _cpu_flags() -> set[str]:
    if platform.machine() != "x86_64":
        return set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels, compiled if need be; for this process alone where they cannot be kept.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    for path in _intact(PREBUILT):
        try:
            return ctypes.CDLL(str(path))
        except OSError as error:
            logger.warning("sparsekv: the CPU kernels of the wheel do not load: %s", error)
    try:
        return ctypes.CDLL(str(build(cache_dir() / "kernels")))
    except OSError as error:
        logger.warning("sparsekv: the CPU kernels are compiled at every start: %s", error)
    try:
        with tempfile.TemporaryDirectory(prefix="vllm_sparsekv-") as folder:
            return ctypes.CDLL(str(build(Path(folder))))
    except OSError as error:
        raise BuildError(f"the kernels can be kept nowhere: {error}") from error


def compiled_isas() -> list[str]:
    """The instruction sets the library holds, best first."""
    return list(ISA_FLAGS) if platform.machine() == "x86_64" else ["portable"]


def build(folder: Path) -> Path:
    """Find the library in a folder, or compile it there; safe against other processes and users.

    Raises:
        BuildError: there is no compiler or it failed.
        OSError: the folder cannot be used, or others could put something there.
    """
    if found := find(usable(folder)):
        return found
    with open(folder / "lock", "w", opener=_open_private) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find(folder):
            return found
        _remove_remains(folder)
        logger.info("sparsekv: compiling the CPU kernels, once, into %s", folder)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = _compile(compiler(), Path(scratch))
            built.chmod(0o600)
            return built.replace(folder / f"kernels-{key()}-{_sha256(built)}.so")


def usable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        OSError: it cannot be made, or others could put something there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder)
    return folder


def find(folder: Path) -> Path | None:
    """The library in a folder of ours, whole and nobody else's; None where there is none.

    Raises:
        OSError: the folder cannot be read.
    """
    for path in _intact(folder):
        try:
            _check_private(path)
        except PermissionError:
            continue
        return path
    return None


def cache_dir() -> Path:
    """What this package keeps: ``vllm_sparsekv`` in the user's cache folder.

    Raises:
        OSError: the user has no home.
    """
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "vllm_sparsekv"
    try:
        return Path.home() / ".cache" / "vllm_sparsekv"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error} Set HOME or XDG_CACHE_HOME") from error


def compiler() -> list[str]:
    """The command that compiles C++: ``CXX``, split as shells do, or the first one found.

    Raises:
        BuildError: there is none.
    """
    given = os.environ.get("CXX", "")
    try:
        commands = [shlex.split(given)] if given.strip() else [["g++"], ["c++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"CXX={given!r}: {error}") from error
    for name, *options in commands:
        if path := shutil.which(name):
            return [path, *options]
    names = ", ".join(command[0] for command in commands)
    raise BuildError(f"no C++ compiler found (looked for {names}; set CXX)")


@cache
def key() -> str:
    """What a library must have been compiled from to serve here."""
    parts = [*FLAGS, str(ISA_FLAGS), platform.machine(), torch.__version__]
    for path in sorted([*KERNELS.rglob("*.cpp"), *KERNELS.rglob("*.h")]):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _intact(folder: Path) -> Iterable[Path]:
    """Libraries for this machine whose content is what their name says."""
    for path in folder.glob(f"kernels-{key()}-*.so"):
        if path.stem.rpartition("-")[2] == _sha256(path):
            yield path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_private(path: Path | int) -> None:
    """Refuse what another user owns or can write to; a path or an open file.

    Raises:
        PermissionError: says which and why.
    """
    found = os.stat(path)
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to user {found.st_uid}")
    if found.st_mode & 0o022:
        mode = found.st_mode & 0o777
        raise PermissionError(f"{path} can be written to by others (mode {mode:o})")


def _open_private(path: str, flags: int) -> int:
    opened = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    try:
        _check_private(opened)
    except PermissionError:
        os.close(opened)
        raise
    return opened


def _remove_remains(folder: Path) -> None:
    """Of builds that were killed, and libraries that are not what was built; under the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.match(f"kernels-{key()}-*.so"):
            logger.warning("sparsekv: %s is damaged or not ours, removed", path)
            path.unlink()


def _compile(compiler: list[str], scratch: Path) -> Path:
    units = list(itertools.product(SOURCES, compiled_isas()))
    objects = [str(scratch / f"{i}.o") for i in range(len(units))]
    _run_all(
        scratch,
        [
            [*compiler, *FLAGS, *ISA_FLAGS[isa], "-c", str(KERNELS / source), "-o", out]
            for (source, isa), out in zip(units, objects, strict=True)
        ],
    )
    out = scratch / "kernels.so"
    _run_all(scratch, [[*compiler, *FLAGS, "-shared", *objects, "-o", str(out)]])
    return out


def _run_all(scratch: Path, commands: list[list[str]]) -> None:
    """Run compilers side by side; each command's last argument is the file it writes.

    Raises:
        BuildError: one of them failed or wrote nothing.
    """
    # What a killed compiler leaves goes with the folder it worked in.
    environment = os.environ | {"TMPDIR": str(scratch)}
    try:
        running = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
            for command in commands
        ]
    except OSError as error:
        raise BuildError(f"the C++ compiler cannot be run: {error}") from error
    outputs = [process.communicate()[1] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode or not Path(command[-1]).exists():
            line = shlex.join(command)
            logger.debug("sparsekv: %s\n%s", line, output)
            raise BuildError(f"{line} failed: {_first_error(output)}")


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["it wrote nothing"]
    return next((line for line in lines if "error" in line), lines[-1])


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1])).chmod(0o644)
    except (BuildError, OSError) as error:
        sys.exit(f"no CPU kernels: {error}")
