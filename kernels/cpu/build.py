"""Compile the native kernels on first use and keep the result.

One library per instruction set, compiled where it runs, so nothing is chosen ahead of time and no
binary holds code its machine cannot run. The cache key covers the sources, the compiler, its flags
and torch (whose OpenMP runtime the library shares).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("vllm.sparsekv.kernels")

KERNELS = Path(__file__).parent.parent
SOURCES = ("attention/cpu.cpp", "pack/cpu.cpp", "window/cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi2"),
    "avx2": _AVX2,
    "portable": (),
}
"""Instruction sets from best to plainest, and what the compiler needs for each."""

_CPU_FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2"},
    "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "abm"},
    "portable": set(),
}


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
def library(isa: str) -> ctypes.CDLL:
    """The loaded kernels for one instruction set, compiled if need be.

    Args:
        isa: a key of ``ISA_FLAGS``.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    return ctypes.CDLL(str(build(isa)))


def build(isa: str) -> Path:
    """Compile one instruction set, or find it in the cache; safe against other processes.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    compiler = _compiler()
    target = cache_dir() / f"{isa}-{_key(compiler, isa)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            logger.info("sparsekv: compiling the CPU kernels for %s, once, into %s", isa, target)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _compile(compiler, isa, Path(folder)).replace(target)
    return target


def cache_dir() -> Path:
    """Where libraries are kept: ``vllm_sparsekv`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_sparsekv"


def _compile(compiler: str, isa: str, folder: Path) -> Path:
    flags = (*FLAGS, *ISA_FLAGS[isa])
    objects = [folder / f"{i}.o" for i in range(len(SOURCES))]
    _run_all(
        [compiler, *flags, "-c", str(KERNELS / source), "-o", str(out)]
        for source, out in zip(SOURCES, objects, strict=True)
    )
    out = folder / "kernels.so"
    _run_all([[compiler, *flags, "-shared", *map(str, objects), "-o", str(out)]])
    return out


def _run_all(commands: object) -> None:
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(process.args)} failed:\n{error}")


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}; set CXX)")


def _key(compiler: str, isa: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, *FLAGS, *ISA_FLAGS[isa], platform.machine(), torch.__version__]
    for path in sorted([*KERNELS.rglob("*.cpp"), *KERNELS.rglob("*.h")]):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
