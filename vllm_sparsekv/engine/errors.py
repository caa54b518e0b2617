"""What went wrong, for people: one line."""

from __future__ import annotations

from typing import Any


def one_line(error: Any) -> str:
    """An exception's message; of pydantic's, which vLLM's configuration raises, the reasons alone.

    A reason that is a field's own names the field and its value.
    """
    if not hasattr(error, "errors"):
        return " ".join(str(error).split())
    reasons = []
    for part in error.errors():
        field = ".".join(map(str, part["loc"]))
        where = f"{field}={part['input']!r}: " if field else ""
        reasons.append(where + part["msg"].removeprefix("Value error, "))
    return " ".join("; ".join(reasons).split())
