"""A JSON file of evaluations that grows one entry at a time and is never half written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import machine, save

SUBJECT = ("model", "dtype", "text", "tokens_sha256", "chunk", "method")
"""What an evaluation is of; a later one of the same takes the place of an earlier."""

KEYS = (*SUBJECT, "window", "settings", "codec")
"""What makes two evaluations the same one; entries that lack one of them are none."""


class Results:
    """Evaluations in a file.

    Args:
        path: read if it exists, replaced as a whole with every :meth:`add`.

    Raises:
        ValueError: the file is not a result file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            try:
                self.entries = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not a result file ({error})") from error

    def has(self, key: dict[str, Any]) -> bool:
        return any(_agree(entry, key, KEYS) for entry in self.entries)

    def add(self, key: dict[str, Any], sums: dict[str, float]) -> None:
        self.entries = [entry for entry in self.entries if not _agree(entry, key, SUBJECT)]
        self.entries.append(key | sums)
        content = {"machine": machine(), "evaluations": self.entries}
        save(self.path, content)


def _agree(entry: dict[str, Any], key: dict[str, Any], names: tuple[str, ...]) -> bool:
    return all(entry.get(name) == key[name] for name in names)
