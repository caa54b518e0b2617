"""``sparsekv-calibrate MODEL``: calibrate the basis in which a model's keys and values lose least.

The model runs in vLLM itself, with the options it will be served with, so whatever vLLM serves can
be calibrated. It writes its own text, unless texts are given; then prompts of that text are read
once more while :mod:`vllm_sparsekv.engine.observer` watches what attention gets.

Rotary embedding turns keys and queries with their position, the slowest planes by little within
one sample. Attention knows only distances, so samples are placed all over the context: the moments
are then those of keys at any position.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load

from vllm_sparsekv.calibration.balance import layer_basis
from vllm_sparsekv.calibration.moments import Moments
from vllm_sparsekv.engine.compat import (
    emulates_dtype,
    first_token,
    model_config,
    offline_engine,
    parse_engine_options,
    read_prompts,
    write_tokens,
)
from vllm_sparsekv.engine.errors import one_line
from vllm_sparsekv.format.basis import LayerBasis
from vllm_sparsekv.format.basis_file import BasisFile, write_basis

TOKENS = 8192
LENGTH = 512
WRITTEN = 256
"""Tokens of one text that the model writes; what is read holds several."""

OBSERVER = "vllm_sparsekv.engine.observer.Observer"
PROGRESS = b"sparsekv progress: "
"""How lines of progress begin that :func:`serve_standard_input` prints."""

ENGINE_OF_ITS_OWN = ("additional_config", "attention_backend")
"""Engine options that are set here, whatever the model will be served with."""

Progress = Callable[[str], None]


def calibrate(
    options: dict[str, Any],
    output: Path,
    context: int | None = None,
    texts: list[Path] | None = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    progress: Progress = lambda line: None,
) -> BasisFile:
    """Calibrate a model and write the file of its bases.

    Args:
        options: vLLM's engine options that differ from its defaults, ``model`` among them.
        output: file to write; it is there whole or as it was before.
        context: positions to calibrate for; None: the engine's ``max_model_len``.
        texts: UTF-8 files to read, in equal parts; None: the model writes its own.
        tokens: to read, of all samples.
        length: tokens of one sample.
        progress: gets lines for people.

    Raises:
        ValueError: a text is too short, or the model cannot be calibrated.
        OSError: a text cannot be read, or the file cannot be written.
    """
    model = model_config(options)
    if emulates_dtype(model):
        options = options | {"dtype": "float32"}
    engine = options | _engine_for(length)
    # What takes images or sounds has a processor, which needs the tokenizer.
    if texts is not None or not model.is_multimodal_model:
        engine["skip_tokenizer_init"] = texts is None
    with offline_engine(engine) as llm:
        config = llm.llm_engine.vllm_config.model_config
        length = min(length, config.max_model_len - 1)  # it also answers, with one token
        count = tokens // length
        if texts is None:
            samples = _written(llm, count, length, progress)
        else:
            samples = _samples_of(texts, llm.get_tokenizer(), count, length)
        layers = _observe(llm, samples, context or config.max_model_len, progress)
    num_layers = config.get_total_num_hidden_layers()
    write_basis(output, layers, num_layers, Path(config.model).name)
    file = BasisFile.open(output)
    file.check()
    return file


def _engine_for(length: int) -> dict[str, Any]:
    """Engine options under which each sample is one step, and whatever was written stays dense."""
    return {
        "attention_backend": "sparsekv",
        "additional_config": {
            "sparsekv": {
                "preset": "capacity",
                "window": length,
                "window_dtype": "auto",
                "basis": "none",
            }
        },
        "worker_extension_cls": OBSERVER,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": max(length, 2048),
        "max_num_seqs": 32,
    }


def _written(llm: Any, count: int, length: int, progress: Progress) -> list[list[int]]:
    """``count`` samples of ``length`` tokens, each of texts that the model writes."""
    each = min(WRITTEN, length)
    texts = -(-count * length // each)
    progress(f"the model writes {texts} texts of {each} tokens")
    written = write_tokens(llm, [first_token(llm, seed) for seed in range(texts)], each)
    tokens = [token for text in written for token in text]
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def _samples_of(texts: list[Path], tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The first tokens of each text in runs of ``length``, ``count`` of all texts.

    Each starts as the tokenizer starts a text.

    Raises:
        ValueError: a text is too short.
    """
    start = tokenizer("").input_ids
    each, size = count // len(texts), length - len(start)
    samples = []
    for path in texts:
        found = tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids[len(start) :]
        if len(found) < each * size:
            raise ValueError(f"{path}: {len(found)} tokens, must be >= {each * size} (--tokens)")
        samples += [start + found[i * size : (i + 1) * size] for i in range(each)]
    return samples


def _observe(
    llm: Any, samples: list[list[int]], context: int, progress: Progress
) -> dict[int, LayerBasis]:
    """Bases by layer, from samples spread over ``context`` positions."""
    ranks = llm.collective_rpc("sparsekv_observe")
    for index, sample in enumerate(samples, 1):
        # Multiples of the golden ratio, modulo 1, fill the unit interval evenly.
        first = round((context - len(sample)) * (index * (5**0.5 - 1) / 2 % 1))
        llm.collective_rpc("sparsekv_place", args=(first,))
        read_prompts(llm, [sample])
        progress(f"sample {index}/{len(samples)}")
    llm.collective_rpc("sparsekv_place", args=(None,))
    layers = {layer["index"]: layer for rank in ranks for layer in rank}
    bases = {}
    for index, layer in sorted(layers.items()):
        whole = Moments.zeros(layer["num_kv_heads"], layer["head_size"])
        for rank, found in zip(
            ranks, llm.collective_rpc("sparsekv_moments", args=(index,)), strict=True
        ):
            if found is not None:
                (here,) = (part for part in rank if part["index"] == index)
                whole.add(Moments(**load(found)), slice(here["first"], here["stop"]))
        bases[index] = layer_basis(whole, centred=bool(layer["centred"]))
    return bases


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command's own arguments, and vLLM's engine options."""
    parser = argparse.ArgumentParser(
        prog="sparsekv-calibrate",
        description="Calibrate the basis of a model's cache. Further options are vLLM's engine "
        "options, as for `vllm serve`: give those the model will be served with.",
    )
    parser.add_argument("model", help="as for `vllm serve`")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="UTF-8 files (default: the model writes its own)"
    )
    parser.add_argument("--output", type=Path, default=Path("basis.safetensors"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"to read (default {TOKENS})")
    parser.add_argument(
        "--length", type=int, default=LENGTH, help=f"of one sample (default {LENGTH})"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    args, rest = parser.parse_known_args(arguments)
    if args.tokens < 2:
        parser.error(f"--tokens {args.tokens}: must be > 1")
    largest = args.tokens // len(args.text or [""])
    if not 1 < args.length <= largest:
        parser.error(f"--length {args.length}: must be > 1 and <= {largest}, a text's --tokens")
    for path in args.text or []:
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"--text {path}: {getattr(error, 'strerror', None) or error}")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    if args.output.is_dir():
        parser.error(f"--output {args.output}: is a folder, must be a file to write")
    try:
        tempfile.TemporaryFile(dir=args.output.parent).close()
    except OSError as error:
        parser.error(f"--output {args.output}: {error.strerror}")
    options = parse_engine_options(["--model", args.model, *rest], prog=parser.prog)
    for name in ENGINE_OF_ITS_OWN:
        if name in options:
            parser.error(f"--{name.replace('_', '-')}: a basis serves all settings, leave it out")
    return args, options


def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        file = calibrate(options, args.output, None, args.text, args.tokens, args.length, progress)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {one_line(error)}")
    if args.json:
        written = {"path": str(file.path), "layers": len(file.shapes), "sha256": file.sha256}
        print(json.dumps(written, indent=2))
    else:
        print(f"{file.path}: {len(file.shapes)} layers")


def serve_standard_input() -> None:
    """Calibrate with the arguments pickled on standard input; lines of progress are marked.

    The last line of standard error says what went wrong.
    """

    def progress(line: str) -> None:
        print(f"{PROGRESS.decode()}{line}", flush=True)

    try:
        calibrate(**pickle.load(sys.stdin.buffer), progress=progress)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {one_line(error)}")


if __name__ == "__main__":
    main()
