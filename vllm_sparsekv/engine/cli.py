"""The ``sparsekv`` command: each of its commands is a module with a ``main`` of its own."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from vllm_sparsekv.engine.errors import one_line

COMMANDS = {
    "inspect": ("inspection", "what a model's cache takes with every preset"),
    "doctor": ("doctor", "whether everything this machine needs is there"),
    "calibrate": ("calibrate", "write the basis of a model's cache to a file"),
}
"""Modules of this package, imported only once vLLM has been told to be quiet."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="sparsekv",
        description="KV caches of vLLM with --attention-backend sparsekv.",
        epilog="commands:\n"
        + "\n".join(f"  {name:10} {does}" for name, (_, does) in COMMANDS.items())
        + "\n\n`sparsekv COMMAND --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    args = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if logging.lastResort is not None:  # which vLLM's loggers use until it sets them up
        logging.lastResort.setLevel(logging.ERROR)
    try:
        module, _ = COMMANDS[args.command]
        importlib.import_module(f"vllm_sparsekv.engine.{module}").main(args.arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
