"""Printing tables and JSON for people and programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import Any


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Aligned columns under a head and a rule. right: the columns of numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    rule = ["-" * width for width in widths]
    lines = []
    for line in (head, rule, *rows):
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        lines.append("  ".join(cells).rstrip())
    print("\n".join(lines))


def print_json(value: Any) -> None:
    """One JSON text, indented for a terminal, on one line for a pipe."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))
