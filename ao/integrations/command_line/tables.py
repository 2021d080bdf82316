"""Printing tables, reports and JSON for people and programs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Sequence
from typing import Any

_WIDTH = 110
"""Columns where the output is no terminal, and COLUMNS says nothing else."""
_LONGEST = 44
"""Characters of a first cell, such as a format with its activation's, that stays in the line of its row in a wide table."""


def fits(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table is no wider than the terminal."""
    return sum(_widths(head, rows)) + 2 * (len(head) - 1) <= shutil.get_terminal_size((_WIDTH, 24)).columns


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Aligned columns under a head and a rule. right: the columns of numbers. A row of one cell is a heading, which takes no part
    in the widths; in a table that is wider than the terminal, so is a long first cell."""
    if not fits(head, rows):
        rows = [
            part
            for row in rows
            for part in ([row[:1], ["", *row[1:]]] if len(row[0]) > _LONGEST and len(row) > 1 else [row])
        ]
    widths = _widths(head, rows)
    rule = ["-" * width for width in widths]
    lines = []
    for line in (head, rule, *rows):
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        lines.append("  ".join(cells).rstrip() if len(line) > 1 else line[0])
    print("\n".join(lines))


def print_grouped(by: int, head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """A table that, where it is wider than the terminal, has the column `by` as headings above the rows that share it."""
    if fits(head, rows):
        return print_table(head, rows, right)
    lines: list[list[str]] = []
    above = None
    for row in rows:
        lines += [[row[by]]] if row[by] != above else []
        above = row[by]
        lines.append(["  " + row[0], *row[1:by], *row[by + 1 :]])
    print_table([*head[:by], *head[by + 1 :]], lines, [i - (i > by) for i in right if i != by])


def _widths(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(head, *(row for row in rows if len(row) > 1))]


def print_report(report: object) -> None:
    """A report of `quantize_` or of a loader, with the options of the program in place of Python's parameters."""
    print(str(report).replace("include_embedding=True", "--include-embedding"))


def print_json(value: Any) -> None:
    """One JSON text, indented for a terminal, on one line for a pipe."""
    print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))
