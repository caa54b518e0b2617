"""``basis: "auto"``: a model's basis, calibrated when it is first served and kept.

Files lie in the user's cache folder under a name made of all that the basis follows from: the
weights, the model's configuration, the positions served and the method. The codecs are not part of
it, one basis serves all. Calibration runs in a process of its own, before the engine's weights
load.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from vllm_sparsekv.calibration.balance import METHOD
from vllm_sparsekv.engine.calibrate import PROGRESS
from vllm_sparsekv.engine.compat import (
    VllmConfig,
    engine_arguments,
    has_weights,
    init_logger,
    largest_position,
    model_identity,
)
from vllm_sparsekv.format.basis_file import VERSION, BasisFile
from vllm_sparsekv.kernels.cpu.build import cache_dir

SERVING_ONLY = (
    "additional_config",
    "attention_",
    "block_size",
    "compilation_config",
    "cudagraph_",
    "data_parallel_",
    "enable_lora",
    "kv_cache_dtype",
    "kv_events_",
    "kv_offloading_",
    "kv_transfer_",
    "lora_",
    "max_cudagraph_",
    "max_lora",
    "served_model_name",
    "spec_",
    "speculative_config",
)
"""How options of vLLM's engine begin that do not change what the model computes."""

PROGRAM = "from vllm_sparsekv.engine.calibrate import serve_standard_input as f; f()"

SECONDS_BETWEEN_LINES = 10
"""Of those that say how far a calibration is."""

logger = init_logger("vllm.sparsekv.calibration")  # below "vllm", whose handlers print it


class CannotCalibrate(Exception):
    """Says why."""


def find_or_calibrate(vllm_config: VllmConfig, tokens: int) -> BasisFile:
    """The basis of the model this engine will serve.

    Args:
        vllm_config: of the engine, while it is being made.
        tokens: to calibrate with.

    Raises:
        CannotCalibrate: there is none and none can be made.
    """
    context = positions(vllm_config)
    try:
        path = basis_path(vllm_config, context, tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _calibrate(vllm_config, context, tokens, path)
    except OSError as error:
        raise CannotCalibrate(str(error)) from error
    file = BasisFile.open(path)
    logger.info("sparsekv: basis of %s: %s", file.model, path)
    return file


def basis_path(vllm_config: VllmConfig, context: int, tokens: int) -> Path:
    """Where a model's basis is kept, be it there or not.

    Raises:
        OSError: the user has no home.
    """
    return cache_dir() / "basis" / f"{_key(vllm_config, context, tokens)}.safetensors"


def _calibrate(vllm_config: VllmConfig, context: int, tokens: int, path: Path) -> None:
    model, arguments = vllm_config.model_config, engine_arguments()
    if vllm_config.load_config.load_format == "dummy":
        raise CannotCalibrate("its weights are dummies")
    if not has_weights(vllm_config):
        raise CannotCalibrate("its folder holds no weights")
    if model.runner_type != "generate":
        raise CannotCalibrate(f"a {model.runner_type} model writes no text")
    if arguments is None:
        raise CannotCalibrate("its configuration was not made from engine arguments")
    if vllm_config.parallel_config.nnodes > 1:
        raise CannotCalibrate("it spans several nodes; run sparsekv-calibrate once for all of them")
    options = {
        name: value for name, value in arguments.items() if not name.startswith(SERVING_ONLY)
    }
    logger.info(
        "sparsekv: calibrating %s, once: it writes some text and reads it (basis 'none' leaves "
        "this out)",
        model.model,
    )
    start = time.monotonic()
    try:
        task = pickle.dumps(
            {"options": options, "output": path, "context": context, "tokens": tokens}
        )
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CannotCalibrate(f"an engine option cannot be handed on ({error})") from error
    _run(task)
    logger.info("sparsekv: calibrated in %.0f s", time.monotonic() - start)


def _run(task: bytes) -> None:
    """Calibrate in a process of its own, and say now and then how far it is.

    Raises:
        CannotCalibrate: with the last line that the process had to say.
    """
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        ) as process,
    ):
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(task)
            said = time.monotonic()
            for line in process.stdout:
                if line.startswith(PROGRESS) and time.monotonic() > said + SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    logger.info("sparsekv: calibrating: %s", line[len(PROGRESS) :].decode().strip())
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise CannotCalibrate(lines[-1] if lines else "no reason given")


def positions(vllm_config: VllmConfig) -> int:
    """Positions to calibrate for: those served, up to a power of two, that the model has."""
    served = vllm_config.model_config.max_model_len
    return min(1 << (served - 1).bit_length(), max(served, largest_position(vllm_config)))


def _key(vllm_config: VllmConfig, context: int, tokens: int) -> str:
    parts: list[Any] = [METHOD, VERSION, context, tokens, *model_identity(vllm_config)]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]
