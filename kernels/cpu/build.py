"""Compile the native kernels on first use and keep the result.

One library holds the kernels for every instruction set of the machine's architecture, compiled from
the same sources; its entry points are named ``sparsekv_<kernel>_<instruction set>`` and ``ops``
chooses among them at run time. The cache key covers the sources, the compiler, its flags and torch
(whose OpenMP runtime the library shares).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
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
SOURCES = ("attention/cpu.cpp", "pack/cpu.cpp", "step/cpu.cpp", "window/cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w")

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vbmi2")
_AMX = ("-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, *_AMX),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
"""Instruction sets from best to plainest, and what the compiler needs for each."""

_AVX512_CPU = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2"}
_CPU_FLAGS = {
    "amx": _AVX512_CPU | {"avx512vbmi", "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512": _AVX512_CPU,
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
def library() -> ctypes.CDLL:
    """The loaded kernels, compiled if need be.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    return ctypes.CDLL(str(build()))


def compiled_isas() -> list[str]:
    """The instruction sets the library holds, best first."""
    return list(ISA_FLAGS) if platform.machine() == "x86_64" else ["portable"]


def build() -> Path:
    """Compile the library, or find it in the cache; safe against other processes.

    Raises:
        BuildError: there is no compiler or it failed.
    """
    compiler = _compiler()
    target = cache_dir() / f"kernels-{_key(compiler)}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            logger.info("sparsekv: compiling the CPU kernels, once, into %s", target)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                _compile(compiler, Path(folder)).replace(target)
    return target


def cache_dir() -> Path:
    """Where libraries are kept: ``vllm_sparsekv`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm_sparsekv"


def _compile(compiler: str, folder: Path) -> Path:
    units = list(itertools.product(SOURCES, compiled_isas()))
    objects = [str(folder / f"{i}.o") for i in range(len(units))]
    _run_all(
        [compiler, *FLAGS, *ISA_FLAGS[isa], "-c", str(KERNELS / source), "-o", out]
        for (source, isa), out in zip(units, objects, strict=True)
    )
    out = folder / "kernels.so"
    _run_all([[compiler, *FLAGS, "-shared", *objects, "-o", str(out)]])
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


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, *FLAGS, str(ISA_FLAGS), platform.machine(), torch.__version__]
    for path in sorted([*KERNELS.rglob("*.cpp"), *KERNELS.rglob("*.h")]):
        parts += [path.name, path.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
