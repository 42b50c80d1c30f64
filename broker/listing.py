"""Tables as text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def listing(found: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Lines: the names of the columns, then the rows, each column as wide as what is in it."""
    rows = [columns, *([cell(row.get(key)) for key in columns] for row in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
